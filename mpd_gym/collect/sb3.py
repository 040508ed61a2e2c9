"""Training of behaviour policies with Stable-Baselines3, which resumes after a kill.

Needs the extra ``collect``: importing this module without it raises `MissingExtraError`.
"""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, final

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from tqdm import tqdm

from mpd_gym.atomic import atomic_path, user_path
from mpd_gym.collect.sb3_replay import (
    RecordingDictReplayBuffer,
    RecordingReplayBuffer,
    buffer_arrays,
    replay_episodes,
    restore_buffer,
)
from mpd_gym.collect.sb3_zip import SB3Policy, load_sb3, read_entries, read_tensors
from mpd_gym.errors import CheckpointError, ConfigError, check_choice, check_integer, require

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback
else:
    BaseCallback = require(
        "stable_baselines3.common.callbacks", "collect", "Training a behaviour policy"
    ).BaseCallback

__all__ = ["CostPenalty", "SB3Policy", "load_sb3", "replay_episodes", "train_sb3"]

FORMAT = "mpd_gym.sb3_training"
VERSION = 1
ENTRIES = ("header.json", "state.pth", "replay.safetensors")
OURS = {  # hyperparameters that `train_sb3` sets
    "device",
    "env",
    "optimize_memory_usage",
    "replay_buffer_class",
    "seed",
    "tensorboard_log",
}
MAX_BYTES = 2**36  # of one part of a checkpoint, which this machine wrote

Wrapper = Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]]


@final
class CostPenalty(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Subtracts ``penalty · info["cost"]`` from the reward, to train policies that avoid costs.

    ``info["reward"]`` holds the environment's own reward.

    Args:
        env: Environment that reports ``info["cost"]`` on every step.
        penalty: Reward lost per unit of cost.

    Raises:
        ConfigError: If `penalty` is negative or not finite; from `step`, without a cost.
    """

    def __init__(self, env: gym.Env[Any, Any], penalty: float) -> None:
        if not (np.isfinite(penalty) and penalty >= 0.0):
            raise ConfigError(f"penalty: expected a number >= 0, got {penalty}")
        RecordConstructorArgs.__init__(self, penalty=penalty)
        super().__init__(env)
        self.penalty = penalty

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step, and return the reward less the penalty."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if "cost" not in info:
            raise ConfigError(
                "CostPenalty: the environment does not report info['cost']; wrap it in one that "
                "does first"
            )
        own = float(reward)
        less = own - self.penalty * float(info["cost"])
        return observation, less, terminated, truncated, {**info, "reward": own}


def train_sb3(
    algorithm: Literal["sac", "ppo"],
    env_id: str,
    *,
    steps: int,
    seed: int,
    env_kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[Wrapper] = (),
    num_envs: int = 1,
    hyperparameters: Mapping[str, Any] | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    save_path: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10_000,
    progress: bool = True,
    threads: int = 1,
) -> BaseAlgorithm:
    """Train a policy on the CPU.

    With `checkpoint`, a killed run that is started again with the same arguments resumes and ends
    with bit-identical weights and replay buffer. (`steps` alone may grow.) For this, every
    `checkpoint_every` steps, with or without a checkpoint, the environments are reset and the
    random numbers seeded again. Choose a multiple of episode length times `num_envs`, so that no
    episode is cut. Only the running means of the logs restart. The global random generators do not
    change.

    Args:
        algorithm: ``"sac"`` or ``"ppo"``.
        env_id: Environment.
        steps: Environment steps in all; PPO rounds up to whole rollouts.
        seed: Seed of the networks, the environments and the exploration.
        env_kwargs: Arguments of the environment.
        wrappers: Wrappers for each environment, the first innermost.
        num_envs: Copies stepped together. SAC is faster with several, as one call of the network
            acts for all.
        hyperparameters: Arguments of SB3's class. By default SAC's replay buffer holds all `steps`.
        log_dir: Folder for TensorBoard.
        save_path: File for the trained policy, an SB3 zip.
        checkpoint: File for networks, optimisers and replay buffer, a zip without SB3's pickles.
        checkpoint_every: Steps between checkpoints.
        progress: Show a progress bar with rate, estimate and mean return.
        threads: Threads of torch.

    Returns:
        SB3's model; `replay_episodes` gives the replay buffer of SAC, `SB3Policy` the policy.

    Raises:
        ConfigError: If an argument is out of range, or differs from the checkpoint's.
        CheckpointError: If the checkpoint is damaged.
    """
    counts = {"steps": steps, "num_envs": num_envs, "checkpoint_every": checkpoint_every}
    _check_arguments(algorithm, hyperparameters, counts)
    _check_zip("save_path", save_path)
    _check_zip("checkpoint", checkpoint)
    arguments = {
        "algorithm": algorithm,
        "env_id": env_id,
        "env_kwargs": dict(env_kwargs or {}),
        "wrappers": list(wrappers),
        "seed": seed,
        "num_envs": num_envs,
        "hyperparameters": dict(hyperparameters or {}),
        "checkpoint_every": checkpoint_every,
    }
    made = partial(_make_env, env_id, env_kwargs or {}, wrappers)
    with _own_randomness(threads):
        model = _new_model(algorithm, made, steps, seed, num_envs, hyperparameters or {})
        if log_dir is not None:
            _log_to(model, user_path(log_dir))
        if checkpoint is not None and user_path(checkpoint).exists():
            _resume(model, user_path(checkpoint), arguments)
        title = f"{algorithm} {env_id}"
        with tqdm(
            total=steps, initial=model.num_timesteps, desc=title, unit="step", disable=not progress
        ) as bar:
            while model.num_timesteps < steps:
                _learn_segment(model, seed, steps, checkpoint_every, bar)
                if checkpoint is not None:
                    _save_checkpoint(model, user_path(checkpoint), arguments)
    if save_path is not None:
        with atomic_path(save_path) as temporary:
            # Without the class, the file opens where this package is not installed.
            model.save(temporary, exclude=["replay_buffer_class"])
    return model


def _check_arguments(
    algorithm: str, hyperparameters: Mapping[str, Any] | None, counts: Mapping[str, int]
) -> None:
    check_choice("algorithm", algorithm, ("ppo", "sac"))
    for name, count in counts.items():
        check_integer(name, count, 1)
    if taken := sorted(OURS & set(hyperparameters or {})):
        raise ConfigError(f"hyperparameters: {taken} are set by train_sb3 itself; leave them out")


def _check_zip(name: str, path: str | os.PathLike[str] | None) -> None:
    if path is not None and Path(path).suffix != ".zip":
        raise ConfigError(f"{name}: expected a file name ending in .zip, got {os.fspath(path)!r}")


def _make_env(
    env_id: str, env_kwargs: Mapping[str, Any], wrappers: Sequence[Wrapper]
) -> gym.Env[Any, Any]:
    env: gym.Env[Any, Any] = gym.make(env_id, **env_kwargs)
    for wrapper in wrappers:
        env = wrapper(env)
    return env


def _new_model(
    algorithm: str,
    made: Callable[[], gym.Env[Any, Any]],
    steps: int,
    seed: int,
    num_envs: int,
    hyperparameters: Mapping[str, Any],
) -> BaseAlgorithm:
    from stable_baselines3 import PPO, SAC
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.preprocessing import is_image_space

    env = make_vec_env(made, n_envs=num_envs)
    space = env.observation_space
    chosen: dict[str, Any] = {"policy": "CnnPolicy" if is_image_space(space) else "MlpPolicy"}
    buffer: type[Any] = RecordingReplayBuffer
    if isinstance(space, spaces.Dict):
        chosen["policy"], buffer = "MultiInputPolicy", RecordingDictReplayBuffer
    if algorithm == "ppo":
        return PPO(**{**chosen, **hyperparameters}, env=env, seed=seed, device="cpu")
    chosen["buffer_size"] = -(-steps // num_envs) * num_envs
    chosen |= hyperparameters
    return SAC(**chosen, env=env, seed=seed, device="cpu", replay_buffer_class=buffer)


def _log_to(model: BaseAlgorithm, folder: Path) -> None:
    """Log to one folder, also over several calls of ``learn``."""
    from stable_baselines3.common.logger import configure

    model.set_logger(configure(str(folder), ["tensorboard"]))


@contextmanager
def _own_randomness(threads: int) -> Iterator[None]:
    """Restore the global generators and the thread count, which SB3 changes."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads(before)


@final
class _Progress(BaseCallback):
    """Moves the bar, and shows schedules the whole run instead of one segment."""

    def __init__(self, bar: Any, steps: int) -> None:
        super().__init__()
        self.bar, self.steps = bar, steps

    def _on_training_start(self) -> None:
        self.model._total_timesteps = self.steps

    def _on_step(self) -> bool:
        self.bar.update(self.num_timesteps - self.bar.n)
        returns = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        if returns:
            self.bar.set_postfix({"return": f"{np.mean(returns):.1f}"}, refresh=False)
        return True


def _learn_segment(model: BaseAlgorithm, seed: int, steps: int, every: int, bar: Any) -> None:
    """Learn up to the next checkpoint, from nothing but what a checkpoint holds."""
    start = model.num_timesteps
    stop = min((start // every + 1) * every, steps)
    words = np.random.SeedSequence([seed, start]).generate_state(1)
    model.set_random_seed(int(words[0]) >> 1)
    model._last_obs = None  # makes SB3 reset the environments
    model.learn(stop - start, callback=_Progress(bar, steps), reset_num_timesteps=False)
    buffer = getattr(model, "replay_buffer", None)
    if isinstance(buffer, RecordingReplayBuffer | RecordingDictReplayBuffer):
        row = (buffer.pos - 1) % buffer.buffer_size
        buffer.extras.cuts[row] = buffer.dones[row] == 0


def _save_checkpoint(model: BaseAlgorithm, path: Path, arguments: Mapping[str, Any]) -> None:
    buffer = getattr(model, "replay_buffer", None)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "arguments": _plain(arguments),
        "num_timesteps": model.num_timesteps,
        "episodes": model._episode_num,
        "updates": model._n_updates,
        "replay": None if buffer is None else {"pos": buffer.pos, "full": buffer.full},
    }
    variables = {name: getattr(model, name) for name in model._get_torch_save_params()[1]}
    state = io.BytesIO()
    torch.save({"parameters": model.get_parameters(), "variables": variables}, state)
    arrays = {} if buffer is None else buffer_arrays(buffer)
    contents = (json.dumps(header).encode(), state.getvalue(), save_arrays(arrays))
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content in zip(ENTRIES, contents, strict=True):
            archive.writestr(name, content)


def _resume(model: BaseAlgorithm, path: Path, arguments: Mapping[str, Any]) -> None:
    """Load everything that `_save_checkpoint` wrote into a new model."""
    entries = read_entries(path, ENTRIES, MAX_BYTES)
    try:
        header = json.loads(entries["header.json"])
        if header["format"] != FORMAT or header["version"] != VERSION:
            raise CheckpointError(f"{path}: not a checkpoint of this version; delete it")
        _check_same_arguments(path, header["arguments"], _plain(arguments))
        state = read_tensors(path, entries["state.pth"], MAX_BYTES)
        model.set_parameters(state["parameters"])
        for name, value in state["variables"].items():
            getattr(model, name).data = value.data
        model.num_timesteps = header["num_timesteps"]
        model._episode_num = header["episodes"]
        model._n_updates = header["updates"]
        if header["replay"] is not None:
            arrays = load_arrays(entries["replay.safetensors"])
            restore_buffer(model.replay_buffer, arrays, **header["replay"])  # type: ignore[attr-defined]
    except (KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint of train_sb3 ({error}); delete it to start again"
        ) from error


def _plain(arguments: Mapping[str, Any]) -> Any:
    """Return `arguments` after a round trip through JSON; classes and functions by name."""

    def name(value: Any) -> str:
        if isinstance(value, partial):
            return f"{name(value.func)}({value.args}, {value.keywords})"
        return f"{value.__module__}.{value.__qualname__}" if callable(value) else repr(value)

    return json.loads(json.dumps(arguments, default=name))


def _check_same_arguments(path: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if saved[name] != value:
            raise ConfigError(
                f"{name}: got {value!r}, but the run in {path} has {saved[name]!r}; pass the same "
                "to resume it, or delete the file to start again"
            )
