"""Policies from Stable-Baselines3 zip files, without running code from the file.

The zip's ``data`` entry is JSON that holds a pickle for everything but plain values, and unpickling
may run any code. This module rebuilds the network instead: its shape from the weights (read
with ``weights_only=True``), its few options from the plain text that SB3 writes next to each
pickle, its spaces from the environment. Needs the extra ``collect``.
"""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from gymnasium import spaces

from mpd_gym.atomic import user_path
from mpd_gym.collect.sb3_network import FAMILIES, policy_family, rebuild_policy
from mpd_gym.collect.sb3_normalize import read_vecnormalize, trained_normalized
from mpd_gym.envs.checks import make_env
from mpd_gym.errors import CheckpointError, ConfigError, InputError, check_choice, require
from mpd_gym.types import Array

if TYPE_CHECKING:
    from stable_baselines3.common.policies import BasePolicy

__all__ = ["SB3Policy", "load_sb3", "read_entries", "read_tensors"]

PURPOSE = "A Stable-Baselines3 policy"
MAX_BYTES = 2**30


@final
class SB3Policy:
    """A Stable-Baselines3 policy with its own random numbers.

    SB3 draws from torch's global generator. This policy has its own stream and does not change the
    global one; a recorder calls `reseed` before each episode.

    Args:
        policy: SB3's policy, for example ``model.policy``.
        seed: Seed of the random numbers.
        statistics: Normalises each observation first; for a policy trained under ``VecNormalize``.
    """

    def __init__(
        self,
        policy: BasePolicy,
        *,
        seed: int = 0,
        statistics: Callable[[Any], Any] | None = None,
    ) -> None:
        self.policy, self.statistics = policy, statistics
        self.observation_space = policy.observation_space
        self.action_space = policy.action_space
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the random numbers of an episode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            explorer: Any = getattr(self.policy, "actor", self.policy)  # holds the noise of gSDE
            if getattr(explorer, "use_sde", False):
                explorer.reset_noise()
            self._random = torch.get_rng_state()

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Array, Any]:
        """Return actions in the environment's units and inside its Box, and `state`; see `Policy`.

        `deterministic` takes the most likely action.

        Raises:
            InputError: If a number in `observation` is not finite, or it does not fit the space.
        """
        parts = observation.values() if isinstance(observation, Mapping) else (observation,)
        if not isinstance(observation, tuple) and not all(np.isfinite(p).all() for p in parts):
            raise InputError(f"observation: expected finite numbers, got {observation}")
        if self.statistics is not None and not isinstance(observation, tuple):
            observation = self.statistics(observation)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            try:
                answer = self.policy.predict(observation, state, episode_start, deterministic)
            except (LookupError, TypeError, ValueError) as error:
                problem = f"observation: expected one of {self.observation_space}, or a batch"
                raise InputError(f"{problem}: {error}") from error
            self._random = torch.get_rng_state()
        return answer


def load_sb3(
    path: str | os.PathLike[str],
    env: Any,
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    algorithm: str | None = None,
    vecnormalize: str | os.PathLike[str] | None = None,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> SB3Policy:
    """Load the policy in a zip file of Stable-Baselines3, also of older versions.

    Nothing pickled runs: weights are read with ``weights_only=True``, and must fit the rebuilt
    network exactly. It supports the policies of SAC, TD3, DDPG, DQN, PPO, A2C, and
    of sb3-contrib's TQC and TRPO, with their own networks. Such files lack the statistics of
    ``VecNormalize``: give them for a policy trained with it; a warning says where the file shows
    that it was.

    Args:
        path: File that SB3's ``model.save`` wrote.
        env: Id of the policy's environment, or an object with its two spaces: an environment, a
            vector of them, a data set.
        env_kwargs: Arguments of the environment, if `env` is an id.
        algorithm: Expected algorithm, for example ``"sac"``; None accepts any.
        vecnormalize: File that ``VecNormalize.save`` wrote, a pickle of which no code runs.
        max_bytes: Largest unpacked size of any part.
        seed: Seed of stochastic actions.

    Raises:
        CheckpointError: If the file is missing, damaged, too large, of another kind, or does not
            fit the environment.
        ConfigError: If the environment cannot be made, or an argument contradicts another.
        MissingExtraError: If Stable-Baselines3 is not installed.
    """
    require("stable_baselines3", "collect", PURPOSE)
    if algorithm is not None:
        check_choice("algorithm", algorithm, FAMILIES)
    observation_space, action_space = _spaces(env, env_kwargs)
    file = user_path(path)
    entries = read_entries(file, ("data", "policy.pth"), max_bytes)
    fields = _fields(file, entries["data"])
    state = read_tensors(file, entries["policy.pth"], max_bytes)
    statistics = None
    if vecnormalize is not None:
        statistics = read_vecnormalize(user_path(vecnormalize), observation_space, max_bytes)
    elif trained_normalized(fields, observation_space):
        warnings.warn(
            f"{file}: was trained under VecNormalize and acts wrongly without its statistics; give "
            "the file of VecNormalize.save: vecnormalize=FILE",
            stacklevel=2,
        )
    try:
        family = _family(state, algorithm)
        policy = rebuild_policy(family, fields, state, observation_space, action_space)
    except CheckpointError as error:
        raise CheckpointError(
            f"{file}: {error}; load it for the environment that it was trained on. A model of "
            "other networks is a policy once its own library has loaded it, such as sb3-contrib's "
            "RecurrentPPO.load(FILE), which runs code from the file"
        ) from error
    return SB3Policy(policy, seed=seed, statistics=statistics)


def read_entries(path: Path, names: Sequence[str], max_bytes: int) -> dict[str, bytes]:
    """Read entries of a zip file, after a check of their unpacked sizes.

    Args:
        path: Zip file.
        names: Entries to read.
        max_bytes: Largest unpacked size of each.

    Raises:
        CheckpointError: If the file is missing, damaged or no zip, or an entry is missing or
            larger than `max_bytes`.
    """
    if not os.path.isfile(path):  # also where the name is too long
        raise CheckpointError(f"{path}: no such file; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            present = {info.filename: info for info in archive.infolist()}
            for name in names:
                if name not in present:
                    raise CheckpointError(
                        f"{path}: expected an entry {name!r}, found {sorted(present)}; the file "
                        "was not written by Stable-Baselines3's model.save"
                    )
                _check_unpacked(path, repr(name), present[name].file_size, max_bytes)
            return {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        problem = f"{path}: damaged or not a zip file ({error}); download it again"
        raise CheckpointError(problem) from error


def _check_unpacked(path: Path, part: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise CheckpointError(
            f"{path}: {part} takes {size} bytes unpacked, more than max_bytes = {max_bytes}; raise "
            "the limit if you expect such a size"
        )


def read_tensors(path: Path, content: bytes, max_bytes: int) -> Any:
    """Unpack what ``torch.save`` wrote, without running code or taking unlimited memory.

    Args:
        path: File of `content`, for messages.
        content: Bytes that ``torch.save`` wrote.
        max_bytes: Largest size of all tensors together.

    Returns:
        The object, of plain containers and tensors.

    Raises:
        CheckpointError: If it is damaged, holds anything else, or is too large.
    """
    buffer = io.BytesIO(content)
    try:
        if zipfile.is_zipfile(buffer):
            with zipfile.ZipFile(buffer) as archive:
                size = sum(info.file_size for info in archive.infolist())
            _check_unpacked(path, "the set of tensors", size, max_bytes)
        buffer.seek(0)
        return torch.load(buffer, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load fails in many ways; all of them mean a bad file
        raise CheckpointError(
            f"{path}: its tensors are damaged, or cannot be read without running code from the "
            f"file ({type(error).__name__}); download it again from a source you trust"
        ) from error


def _spaces(
    env: Any, env_kwargs: Mapping[str, Any] | None
) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    """Spaces of one environment, images channel first as SB3 sees them."""
    if isinstance(env, str):
        made = make_env(env, env_kwargs)
        observation, action = made.observation_space, made.action_space
        made.close()
    elif env_kwargs:
        raise ConfigError("env_kwargs: only for an environment given by its id")
    else:
        observation = getattr(env, "single_observation_space", env.observation_space)
        action = getattr(env, "single_action_space", env.action_space)
    if isinstance(observation, spaces.Dict):
        parts = {key: _channels_first(part) for key, part in observation.items()}
        return spaces.Dict(parts), action
    return _channels_first(observation), action


def _channels_first(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Turn the space of a channel-last image as SB3 turns the image; leave all others."""
    from stable_baselines3.common import preprocessing
    from stable_baselines3.common.vec_env import VecTransposeImage

    if not (isinstance(space, spaces.Box) and preprocessing.is_image_space(space)):
        return space
    if preprocessing.is_image_space_channels_first(space):
        return space
    return VecTransposeImage.transpose_space(space)


def _fields(path: Path, content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        problem = f"{path}: its 'data' is not JSON ({error}); download it again"
        raise CheckpointError(problem) from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: its 'data' is not a JSON object; download it again")
    return fields


def _family(state: Any, algorithm: str | None) -> str:
    """Return the kind of policy, after a check against the expected algorithm."""
    family = policy_family(state)
    if family is None:
        raise CheckpointError(f"its weights belong to none of {', '.join(FAMILIES)}")
    if algorithm is not None and FAMILIES[algorithm] != family:
        raise CheckpointError(f"expected a policy of {algorithm}, got one of kind {family}")
    return family
