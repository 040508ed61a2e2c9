"""One file for one agent: weights, normalisers, spaces and configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from gymnasium import spaces
from minari.serialization import deserialize_space, serialize_space
from torch import Tensor, nn

from mpd_gym.checkpoint import load_file, load_into, save_file
from mpd_gym.datasets import FittedConditions, Normalizers, WindowConfig, normalizer_from_arrays
from mpd_gym.errors import CheckpointError
from mpd_gym.latent.encoder import SHIPPED, ImageEncoder
from mpd_gym.types import Array

if TYPE_CHECKING:
    from mpd_gym.agents.trained import TrainedAgent

__all__ = [
    "StoredAgent",
    "agent_path",
    "load_agent",
    "read_agent",
    "shipped_agents",
    "write_agent",
]

KIND = "agent"
_SUFFIX = ".safetensors"


def write_agent(
    path: str | os.PathLike[str],
    name: str,
    config: Mapping[str, Any],
    models: Mapping[str, nn.Module],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    normalizers: Normalizers,
    conditions: FittedConditions,
    history: Mapping[str, Any],
    encoder: ImageEncoder | None = None,
) -> None:
    """Write an agent's file, whole or not at all.

    Args:
        path: Ends in ``.safetensors``.
        name: Of the agent, a key of `AGENTS`.
        config: Its configuration as JSON values.
        models: Its networks by role.
        observation_space: The environment's.
        action_space: The environment's.
        normalizers: Of observations, actions and goals.
        conditions: With their scaling.
        history: What it was trained on and how, JSON values.
        encoder: Of stacked frames; None where observations are states.
    """
    tensors: dict[str, Tensor | Array] = {
        f"models/{role}/{key}": tensor
        for role, model in models.items()
        for key, tensor in model.state_dict().items()
    }
    for part, normalizer in normalizers._asdict().items():
        if normalizer is not None:
            arrays = normalizer.arrays()
            tensors |= {f"normalizers/{part}/{key}": array for key, array in arrays.items()}
    tensors |= {f"conditions/{key}": array for key, array in conditions.arrays().items()}
    header = {
        "agent": name,
        "config": config,
        "observation_space": serialize_space(observation_space),
        "action_space": serialize_space(action_space),
        "history": dict(history),
    }
    if encoder is not None:
        weights = encoder.model.state_dict()
        tensors |= {f"encoder/{key}": tensor for key, tensor in weights.items()}
        header["encoder"] = encoder.header()
    save_file(path, tensors, header, kind=KIND)


@final
@dataclass(frozen=True)
class StoredAgent:
    """Contents of an agent's file, checked but not yet built.

    Attributes:
        source: The file, for messages.
        name: Of the agent, a key of `AGENTS`.
        config: Configuration as JSON values.
        observation_space: The environment's.
        action_space: The environment's.
        history: What it was trained on and how.
        tensors: Everything else.
        encoder: Of stacked frames; None where observations are states.
    """

    source: str
    name: str
    config: Mapping[str, Any]
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    history: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    encoder: ImageEncoder | None = None

    def scalings(self, kind: str, windows: WindowConfig) -> tuple[Normalizers, FittedConditions]:
        """Build normalisers of one kind and the conditions.

        Raises:
            CheckpointError: If their tables are missing or damaged.
        """
        parts = {
            part: normalizer_from_arrays(kind, arrays)
            for part in Normalizers._fields
            if (arrays := self._arrays(f"normalizers/{part}/"))
        }
        if not {"observation", "action"} <= set(parts):
            raise CheckpointError(f"{self.source}: its normalisers are missing; train again")
        normalizers = Normalizers(**parts)
        arrays = self._arrays("conditions/")
        return normalizers, FittedConditions.from_arrays(windows, normalizers, arrays)

    def load_weights(self, models: Mapping[str, nn.Module]) -> None:
        """Fill models with the stored weights, strictly.

        Raises:
            CheckpointError: If a tensor is missing, unknown, or of another shape or type.
        """
        for role, model in models.items():
            load_into(model, self.tensors, f"models/{role}/", source=self.source)
        unknown = {
            name
            for name in self.tensors
            if name.startswith("models/") and name.split("/")[1] not in models
        }
        if unknown:
            raise CheckpointError(
                f"{self.source}: holds weights that its configuration does not name: "
                f"{sorted(unknown)[:3]}; train again"
            )

    def _arrays(self, prefix: str) -> dict[str, Array]:
        return {
            name.removeprefix(prefix): tensor.numpy()
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def read_agent(source: str | os.PathLike[str], name: str | None = None) -> StoredAgent:
    """Read an agent's file and check every byte of it.

    Args:
        source: Path, or id of a shipped agent.
        name: The agent it must be; None accepts any.

    Raises:
        CheckpointError: If it cannot be read, is damaged, or holds another agent.
    """
    path = agent_path(source)
    tensors, header = load_file(path, kind=KIND)
    if name is not None and header.get("agent") != name:
        raise CheckpointError(
            f"{path}: holds the agent {header.get('agent')!r}, not {name!r}; load it with its own "
            "class, or with load_agent"
        )
    encoder = None
    if "encoder" in header:
        encoder = ImageEncoder.restored(header["encoder"], tensors, "encoder/", str(path))
    try:
        return StoredAgent(
            str(path),
            header["agent"],
            header["config"],
            deserialize_space(header["observation_space"]),
            deserialize_space(header["action_space"]),
            header["history"],
            tensors,
            encoder,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its header is incomplete ({error!r}); train again"
        ) from error


def load_agent(
    source: str | os.PathLike[str], device: str = "auto", **options: Any
) -> TrainedAgent[Any]:
    """Read an agent of any method; arguments and errors as `TrainedAgent.load`.

    Raises:
        CheckpointError: Also if no agent of this package has the name that the file gives.
        ConfigError: If an option is unknown or out of range.
    """
    from mpd_gym.agents import AGENTS, agent_class  # the classes import this module

    stored = read_agent(source)
    if stored.name not in AGENTS:
        raise CheckpointError(
            f"{stored.source}: holds the agent {stored.name!r}; this version has {sorted(AGENTS)}. "
            "Install the version that wrote it"
        )
    return agent_class(stored.name).restored(stored, device, **options)


def agent_path(source: str | os.PathLike[str]) -> Path:
    """Path of an agent's file.

    Args:
        source: A path, or the id of an agent that ships with the package.

    Raises:
        CheckpointError: If there is neither; lists the shipped agents.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(
            f"source: expected a path, or the id of a shipped agent; got {source!r}"
        )
    path = Path(source)
    if path.exists():
        return path
    shipped = shipped_agents()
    if str(source) in shipped:
        return shipped[str(source)]
    raise CheckpointError(
        f"{source}: no such file, and no agent of that id ships with the package; shipped are "
        f"{sorted(shipped)}"
    )


def shipped_agents() -> dict[str, Path]:
    """Files of the agents that ship with the package, by environment id."""
    folder = Path(str(resources.files("mpd_gym"))) / "pretrained"
    paths = sorted(folder.glob(f"*{_SUFFIX}"))
    return {path.stem: path for path in paths if path.name not in SHIPPED.values()}
