"""What an agent is made of, and its file: weights, normalisers, spaces and configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import numpy as np
import torch
from minari.serialization import deserialize_space, serialize_space
from torch import Tensor, nn

from mpd_gym.agents.config import AgentConfig, Sizes
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.spaces import Spaces
from mpd_gym.atomic import user_path
from mpd_gym.checkpoint import load_file, load_into, save_file
from mpd_gym.datasets import FittedConditions, Normalizers, normalizer_from_arrays
from mpd_gym.errors import MALFORMED, CheckpointError
from mpd_gym.latent.encoder import SHIPPED, ImageEncoder
from mpd_gym.types import Array

__all__ = [
    "AgentParts",
    "StoredAgent",
    "agent_path",
    "described",
    "read_agent",
    "shipped_agents",
    "write_agent",
]

KIND = "agent"
_SUFFIX = ".safetensors"

C = TypeVar("C", bound=AgentConfig)


@final
@dataclass(frozen=True)
class AgentParts(Generic[C]):
    """What an agent is made of.

    Attributes:
        config: Its configuration.
        models: Networks by role, those of `config.roles()`; moved to `device`, for evaluation.
        spaces: The environment's, and the encoder of an agent that plans in a latent space.
        normalizers: Of observations, actions and goals.
        conditions: With the scaling of the training data.
        history: What it was trained on and how, JSON values.
        device: Of the models.
    """

    config: C
    models: Mapping[str, nn.Module]
    spaces: Spaces
    normalizers: Normalizers
    conditions: FittedConditions
    history: dict[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        models = {role: model.to(self.device).eval() for role, model in self.models.items()}
        object.__setattr__(self, "models", models)
        object.__setattr__(self, "history", dict(self.history))

    @property
    def sizes(self) -> Sizes:
        """What the networks fit."""
        return Sizes(self.spaces.nx, self.spaces.nu, self.conditions.sizes)


def write_agent(
    path: str | os.PathLike[str], name: str, parts: AgentParts[Any], sampling: SamplingConfig
) -> None:
    """Write an agent's file, whole or not at all.

    Args:
        path: Ends in ``.safetensors``.
        name: Of the agent, a key of `AGENTS`.
        parts: What it is made of.
        sampling: Its present options.
    """
    tensors: dict[str, Tensor | Array] = {
        f"models/{role}/{key}": tensor
        for role, model in parts.models.items()
        for key, tensor in model.state_dict().items()
    }
    for part, normalizer in parts.normalizers._asdict().items():
        if normalizer is not None:
            arrays = normalizer.arrays()
            tensors |= {f"normalizers/{part}/{key}": array for key, array in arrays.items()}
    tensors |= {f"conditions/{key}": array for key, array in parts.conditions.arrays().items()}
    header = {
        "agent": name,
        "config": asdict(replace(parts.config, sampling=sampling)),
        "observation_space": serialize_space(parts.spaces.observation),
        "action_space": serialize_space(parts.spaces.action),
        "history": parts.history,
    }
    encoder = parts.spaces.encoder
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
        spaces: The environment's, and the encoder.
        history: What it was trained on and how.
        tensors: Everything else.
    """

    source: str
    name: str
    config: Mapping[str, Any]
    spaces: Spaces
    history: dict[str, Any]
    tensors: Mapping[str, Tensor]

    def parts(self, kind: type[C], device: torch.device) -> AgentParts[C]:
        """Build what the agent is made of.

        Args:
            kind: Class of its configuration.
            device: Of the models.

        Raises:
            CheckpointError: If a table or tensor is missing, unknown, damaged or of another size.
            ConfigError: If the configuration is wrong.
        """
        config = kind.from_json(self.config)
        found = {
            part: normalizer_from_arrays(config.normalizer, arrays)
            for part in Normalizers._fields
            if (arrays := self._arrays(f"normalizers/{part}/"))
        }
        if not {"observation", "action"} <= set(found):
            raise CheckpointError(f"{self.source}: its normalisers are missing; train again")
        normalizers = Normalizers(**found)
        fitted = {part: normalizer.size for part, normalizer in found.items()}
        shown = {"observation": self.spaces.nx, "action": self.spaces.nu}
        shown |= {"goal": self.spaces.goal_size} if "goal" in found else {}
        if fitted != shown:
            raise CheckpointError(
                f"{self.source}: its normalisers have sizes {fitted}, its spaces {shown}"
            )
        arrays = self._arrays("conditions/")
        conditions = FittedConditions.from_arrays(config.windows, normalizers, arrays)
        sizes = Sizes(self.spaces.nx, self.spaces.nu, conditions.sizes)
        with torch.device("meta"):  # sizes are compared before memory is taken
            self._load_weights(config.models(sizes))
        models = config.models(sizes)
        self._load_weights(models)
        return AgentParts(
            config, models, self.spaces, normalizers, conditions, self.history, device
        )

    def _load_weights(self, models: Mapping[str, nn.Module]) -> None:
        """Fill models with the stored weights, strictly."""
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
    with described(str(path)), np.errstate(over="raise"):  # of bounds
        observation, action = (
            deserialize_space(header[f"{part}_space"]) for part in ("observation", "action")
        )
        spaces, history = Spaces(observation, action, encoder), dict(header["history"])
        return StoredAgent(
            str(path), str(header["agent"]), header["config"], spaces, history, tensors
        )


@contextmanager
def described(source: str) -> Iterator[None]:
    """Name the file in every error that its header can cause."""
    try:
        yield
    except (RuntimeError, *MALFORMED) as error:  # RuntimeError: PyTorch's of sizes
        if isinstance(error, CheckpointError) and str(error).startswith(source):
            raise
        raise CheckpointError(
            f"{source}: its header does not describe an agent ({type(error).__name__}: "
            f"{error!s:.300}); copy it again, or train again"
        ) from error


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
    path = user_path(source)
    if os.path.exists(path):  # False, too, where the name is too long
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
