"""Stable-Baselines3 policies, rebuilt from weights and plain text without pickle."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mpd_gym.errors import CheckpointError
from mpd_gym.types import Array

if TYPE_CHECKING:
    from stable_baselines3.common.policies import BasePolicy

__all__ = ["FAMILIES", "policy_family", "rebuild_policy"]

FAMILIES = {  # algorithm -> kind of policy
    "a2c": "actor-critic",
    "ddpg": "td3",
    "dqn": "dqn",
    "ppo": "actor-critic",
    "sac": "sac",
    "td3": "td3",
    "tqc": "sac",  # the same actor
    "trpo": "actor-critic",
}
MARKS = {  # kind of policy -> how the name of one of its weights begins
    "td3": "actor_target.",
    "sac": "actor.log_std",
    "actor-critic": "action_net.",
    "dqn": "q_net.",
}
ACTION_SPACES: dict[str, tuple[type[spaces.Space[Any]], ...]] = {
    "actor-critic": (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
    "dqn": (spaces.Discrete,),
    "sac": (spaces.Box,),
    "td3": (spaces.Box,),
}
TQC = "sb3_contrib.tqc.policies"
MODULES = {
    TQC,
    "stable_baselines3.common.policies",
    "stable_baselines3.dqn.policies",
    "stable_baselines3.sac.policies",
    "stable_baselines3.td3.policies",
}
ACTIVATIONS = ("ELU", "GELU", "LeakyReLU", "Mish", "ReLU", "SELU", "SiLU", "Sigmoid", "Tanh")
FLAGS = ("normalize_images", "squash_output", "use_expln")
UNDERSTOOD = {  # those not used below show in the weights, or matter in training only
    *FLAGS,
    "activation_fn",
    "clip_mean",
    "device",
    "features_extractor_class",
    "features_extractor_kwargs",
    "full_std",
    "log_std_init",
    "n_critics",
    "n_quantiles",
    "net_arch",
    "optimizer_class",
    "optimizer_kwargs",
    "ortho_init",
    "share_features_extractor",
    "use_sde",
}
LARGEST_FEATURES = 2**14  # outputs of an image network; guards memory against a crafted file

State = Mapping[str, Tensor]


def policy_family(state: Any) -> str | None:
    """Return the kind of a policy, judged by the names of its weights; None if unknown."""
    names = [name for name in state if isinstance(name, str)] if isinstance(state, dict) else []
    for family, mark in MARKS.items():
        if any(name.startswith(mark) for name in names):
            return family
    return None


def rebuild_policy(
    family: str,
    fields: Mapping[str, Any],
    state: dict[str, Tensor],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
) -> BasePolicy:
    """Build SB3's policy for the two spaces and give it the weights.

    Args:
        family: Result of `policy_family`.
        fields: JSON fields of the file; for pickled ones only the plain text is used.
        state: Weights by name.
        observation_space: Of the environment, images channel first.
        action_space: Of the environment.

    Raises:
        CheckpointError: If the policy's class or an option is not SB3's own, a weight is not
            finite, or weights and spaces do not match.
    """
    module = _module(fields)
    kinds = ACTION_SPACES[family]
    if not isinstance(action_space, kinds):
        raise CheckpointError(f"a policy of kind {family} acts in {kinds}, not in {action_space}")
    _check_space("observation", fields.get("observation_space"), observation_space)
    _check_space("action", fields.get("action_space"), action_space)
    _check_tensors(state)
    options = _options(family, fields.get("policy_kwargs"), state, observation_space, action_space)
    make = _policy_class(family)
    policy: Any = make(observation_space, action_space, lambda _: 0.0, **options)
    if family == "actor-critic":
        state = _with_aliases(state)
    if module == TQC:  # its critics tell quantiles, and are not needed to act
        policy = policy.actor
        state = {k.removeprefix("actor."): v for k, v in state.items() if k.startswith("actor.")}
    _check_same(policy.state_dict(), state)
    policy.load_state_dict(state)
    policy.set_training_mode(False)
    rebuilt: BasePolicy = policy
    return rebuilt


def _module(fields: Mapping[str, Any]) -> str | None:
    """Module of the policy's class, if the file tells it and it is one that can be rebuilt."""
    text = fields.get("policy_class")
    module = text.get("__module__") if isinstance(text, dict) else None
    if module is not None and module not in MODULES:
        raise CheckpointError(f"its policy class is from {module!r}, which is not rebuilt here")
    return module


def _check_space(name: str, text: Any, space: spaces.Space[Any]) -> None:
    """Compare a Box with SB3's plain text about it (bounds for actions only)."""
    if not isinstance(text, dict) or not isinstance(space, spaces.Box):
        return  # the weights' shapes are checked later
    shape = text.get("_shape", text.get("shape"))
    if isinstance(shape, list) and tuple(shape) != space.shape:
        raise CheckpointError(
            f"made for {name}s of shape {tuple(shape)}, but the environment has {space.shape}"
        )
    for bound in ("low", "high") if name == "action" else ():
        saved, own = _numbers(text.get(bound)), getattr(space, bound).ravel()
        if saved is not None and not (
            saved.shape == own.shape and np.allclose(saved, own, rtol=1e-5, atol=1e-6)
        ):
            raise CheckpointError(
                f"made for actions with {bound} {saved}, but the environment has {own}"
            )


def _numbers(text: Any) -> Array | None:
    """Parse a printed array; None if the text is cut or no array."""
    if not isinstance(text, str) or "..." in text:
        return None
    try:
        return np.array([float(word) for word in re.sub(r"[\[\]]", " ", text).split()])
    except ValueError:
        return None


def _check_tensors(state: State) -> None:
    """Accept dense, contiguous, finite tensors only; others may claim a false size."""
    for name, tensor in state.items():
        if not (isinstance(tensor, Tensor) and tensor.layout is torch.strided):
            raise CheckpointError(f"{name}: expected a dense tensor, got {type(tensor).__name__}")
        if not tensor.is_contiguous():
            raise CheckpointError(f"{name}: expected a contiguous tensor")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name}: holds NaN or infinity")


def _options(
    family: str,
    kwargs: Any,
    state: State,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
) -> dict[str, Any]:
    """Find the arguments of the policy class in the weights' shapes and the plain text."""
    kwargs = kwargs if isinstance(kwargs, dict) else {}
    text = {name: value for name, value in kwargs.items() if not name.startswith(":")}
    if unknown := sorted(set(text) - UNDERSTOOD):
        raise CheckpointError(f"its policy has options that are not understood: {unknown}")
    options: dict[str, Any] = {name: _flag(name, text[name]) for name in FLAGS if name in text}
    if "activation_fn" in text:
        options["activation_fn"] = _activation(text["activation_fn"])
    width, extractor = _extractor(text, state, observation_space)
    options |= extractor
    if family == "actor-critic":
        return options | _actor_critic(state, width, action_space)
    if family == "dqn":
        return options | {"net_arch": _layers(state, "q_net.q_net.", width)[:-1]}
    size = math.prod(action_space.shape or (1,))
    critics = {name.split(".")[1] for name in state if name.startswith("critic.qf")}
    if not critics:
        raise CheckpointError("weights of its critics are missing")
    options["n_critics"] = len(critics)
    actor = "actor.latent_pi." if family == "sac" else "actor.mu."
    pi = _layers(state, actor, width)
    options["net_arch"] = {
        "pi": pi if family == "sac" else pi[:-1],
        "qf": _layers(state, "critic.qf0.", width + size)[:-1],
    }
    if family == "sac" and "actor.log_std" in state:
        options["use_sde"] = True
        clip = text.get("clip_mean", 2.0)
        if not isinstance(clip, int | float):
            raise CheckpointError(f"clip_mean: expected a number, got {clip!r}")
        options["clip_mean"] = float(clip)
    return options


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"{name}: expected true or false, got {value!r}")
    return value


def _activation(text: Any) -> type[torch.nn.Module]:
    match = re.fullmatch(r"<class 'torch\.nn\.modules\.activation\.(\w+)'>", str(text))
    if match is None or match[1] not in ACTIVATIONS:
        raise CheckpointError(f"activation_fn: expected one of {ACTIVATIONS}, got {text!r}")
    activation: type[torch.nn.Module] = getattr(torch.nn, match[1])
    return activation


def _extractor(
    text: Mapping[str, Any], state: State, space: spaces.Space[Any]
) -> tuple[int, dict[str, Any]]:
    """Return the width of the features, and the arguments of SB3's extractor for them."""
    from stable_baselines3.common import torch_layers

    kwargs: dict[str, Any] = {}
    rows = [t.shape[0] for name, t in state.items() if name.endswith("linear.0.weight")]
    if rows and max(rows) > LARGEST_FEATURES:
        raise CheckpointError(f"its image network has {max(rows)} outputs, more than is plausible")
    kind: type[torch_layers.BaseFeaturesExtractor] = torch_layers.FlattenExtractor
    if isinstance(space, spaces.Dict):
        kind = torch_layers.CombinedExtractor
        kwargs = {"cnn_output_dim": rows[0]} if rows else {}
    elif rows:
        kind, kwargs = torch_layers.NatureCNN, {"features_dim": rows[0]}
    named = text.get("features_extractor_class")
    if named is not None and named != str(kind):
        raise CheckpointError(f"features_extractor_class: expected {kind}, got {named!r}")
    checks = {} if text.get("normalize_images", True) else {"normalized_image": True}
    if kind is torch_layers.FlattenExtractor:
        checks = {}
    try:
        width = kind(space, **kwargs, **checks).features_dim
    except (AssertionError, RuntimeError) as error:
        raise CheckpointError(f"its image network does not fit the space {space}") from error
    return width, {"features_extractor_class": kind, "features_extractor_kwargs": kwargs}


def _actor_critic(state: State, width: int, action_space: spaces.Space[Any]) -> dict[str, Any]:
    if any(name.startswith("mlp_extractor.shared_net.") for name in state):
        raise CheckpointError("it shares layers as SB3 did before 1.8, which SB3 no longer does")
    log_std = state.get("log_std")
    options: dict[str, Any] = {
        "ortho_init": False,
        "net_arch": {
            "pi": _layers(state, "mlp_extractor.policy_net.", width),
            "vf": _layers(state, "mlp_extractor.value_net.", width),
        },
        "share_features_extractor": all(
            torch.equal(tensor, state[name.replace("vf_", "pi_", 1)])
            for name, tensor in state.items()
            if name.startswith("vf_features") and name.replace("vf_", "pi_", 1) in state
        ),
    }
    if log_std is not None and log_std.ndim == 2:
        size = math.prod(action_space.shape or (1,))
        options |= {"use_sde": True, "full_std": size == 1 or log_std.shape[1] != 1}
    return options


def _layers(state: State, prefix: str, inputs: int) -> list[int]:
    """Return the outputs of each linear layer under `prefix`; each must fit the one before."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.weight")
    found = {int(m[1]): state[name] for name in state if (m := pattern.fullmatch(name))}
    sizes = []
    for _, weight in sorted(found.items()):
        if weight.ndim != 2 or weight.shape[1] != inputs:
            raise CheckpointError(
                f"{prefix}*: expected a layer that reads {inputs} numbers, got shape "
                f"{tuple(weight.shape)}"
            )
        inputs = weight.shape[0]
        sizes.append(inputs)
    return sizes


def _with_aliases(state: State) -> dict[str, Tensor]:
    """Rename the shared features of files before SB3 1.7 as in later versions."""
    shared = {k: v for k, v in state.items() if k.startswith("features_extractor.")}
    aliases = {f"{part}_{name}": v for name, v in shared.items() for part in ("pi", "vf")}
    return aliases | dict(state)


def _check_same(expected: State, state: State) -> None:
    """Check that names, shapes and dtypes match the rebuilt network."""
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or extra:
        raise CheckpointError(f"weights are missing {missing} or not understood {extra}")
    for name, tensor in expected.items():
        own = state[name]
        if own.shape != tensor.shape or own.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name}: expected {tuple(tensor.shape)} {tensor.dtype}, got {tuple(own.shape)} "
                f"{own.dtype}"
            )


def _policy_class(family: str) -> type[Any]:
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.dqn.policies import DQNPolicy
    from stable_baselines3.sac.policies import SACPolicy
    from stable_baselines3.td3.policies import TD3Policy

    classes = {
        "actor-critic": ActorCriticPolicy,
        "dqn": DQNPolicy,
        "sac": SACPolicy,
        "td3": TD3Policy,
    }
    return classes[family]
