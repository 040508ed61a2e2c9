"""Recipes of the package's data sets; one command makes each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, final

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from mpd_gym._version import __version__
from mpd_gym.atomic import check_writable
from mpd_gym.collect.lqr import NoisyLQR
from mpd_gym.collect.noisy import NoisyPolicy
from mpd_gym.collect.random_driver import RandomDriver
from mpd_gym.collect.record import DatasetInfo, record, write_dataset
from mpd_gym.collect.rollout import Assignment, Runner
from mpd_gym.envs.image_pendulum import FRAMES, draw
from mpd_gym.errors import ConfigError, check_choice
from mpd_gym.types import Episode, Policy

__all__ = ["PENDULUM_RETURNS", "RECIPES", "Collection", "Recipe", "collect", "info"]

AUTHOR = "The mpd_gym authors"
CODE = f"mpd_gym/collect/recipes.py of mpd-gym {__version__}"
# Reference scores: returns that count as 0 and 1.
LQR_RETURNS = (-358.0, -0.239)  # no control, and the optimal gain; both expectations
CAR_RETURNS = (-64.0, -24.6)  # never at the goal, and nonlinear MPC
PENDULUM_RETURNS = (-1225.0, -150.0)  # random actions, and a trained SAC
# Largest error as a share of the largest action; 7 drives of 1,000 end in a wall.
DRIVING_NOISE = 0.5
SAFE_PENALTY = 100.0  # for one step beyond the limit; with 10 some violations remain
# Ten copies and two updates per step of all copies: 100,000 steps in two minutes on one core.
COPIES = 10
SAC: Mapping[str, Any] = {
    "learning_rate": 1e-3,
    "learning_starts": 1_000,
    "gradient_steps": 2,
    "policy_kwargs": {"net_arch": [64, 64]},
}


@final
@dataclass(frozen=True)
class Collection:
    """Settings of a recipe's run.

    Attributes:
        dataset_id: Id of the new data set.
        policies: Folder for trained policies: Stable-Baselines3 zips and checkpoints.
        seed: Seed of everything.
        fraction: Share of the full size, for a trial; sizes are rounded up.
        processes: Processes that record.
        overwrite: Replace a data set of that id.
        progress: Show progress bars.
    """

    dataset_id: str
    policies: Path
    seed: int = 0
    fraction: float = 1.0
    processes: int = 1
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction: expected a share in (0, 1], got {self.fraction}")

    def size(self, full: int) -> int:
        """Number of episodes or steps out of `full`."""
        return max(1, int(np.ceil(full * self.fraction)))


@final
@dataclass(frozen=True)
class Recipe:
    """A data set that the package can make.

    Attributes:
        dataset_id: Minari id.
        description: Content.
        run: Function that makes it; or ``"module:function"``, as in Gymnasium's registry, if it
            belongs to a layer above.
    """

    dataset_id: str
    description: str
    run: Callable[[Collection], Any] | str

    def load(self) -> Callable[[Collection], Any]:
        """Return the function that makes it."""
        if callable(self.run):
            return self.run
        module, name = self.run.split(":")
        function: Callable[[Collection], Any] = getattr(import_module(module), name)
        return function


def collect(name: str, **options: Any) -> Any:
    """Make a data set; a repeated call resumes an interrupted one.

    Args:
        name: A key of `RECIPES`.
        options: Fields of `Collection`; `dataset_id` defaults to `name`.

    Returns:
        The Minari data set.

    Raises:
        ConfigError: If there is no such recipe, or the data set exists.
        MissingExtraError: If the recipe needs CasADi or Stable-Baselines3 and it is not installed.
    """
    check_choice("data set", name, RECIPES)
    given = {"dataset_id": name, "policies": Path("outputs/policies"), **options}
    return RECIPES[name].load()(Collection(**given))


def info(algorithm: str, description: str, returns: tuple[float, float]) -> DatasetInfo:
    """Describe a data set.

    Args:
        algorithm: Policy that acted.
        description: Content.
        returns: Returns that count as 0 and 1.
    """
    return DatasetInfo(
        author=AUTHOR,
        code_permalink=CODE,
        algorithm_name=algorithm,
        description=description,
        ref_min_score=returns[0],
        ref_max_score=returns[1],
    )


def _record(
    collection: Collection,
    policy: Callable[[], Policy],
    env_id: str,
    episodes: int,
    about: DatasetInfo,
    **options: Any,
) -> Any:
    return record(
        policy,
        env_id,
        collection.dataset_id,
        episodes=collection.size(episodes),
        seed=collection.seed,
        processes=collection.processes,
        overwrite=collection.overwrite,
        progress=collection.progress,
        info=about,
        **options,
    )


# --- LQR -------------------------------------------------------------------------------------


def _noisy_lqr(probability: float) -> Policy:
    env: Any = gym.make("LQR-v0").unwrapped
    return NoisyLQR(env.optimal_gain, probability, action_space=env.action_space)


def _collect_lqr(percent: int, collection: Collection) -> Any:
    about = info(
        "LQR with Bernoulli-Gaussian input noise (MPDiffuser paper, eq. 5)",
        f"Optimal gain; noise of 0.25 on {percent} % of the steps.",
        LQR_RETURNS,
    )
    return _record(
        collection,
        functools.partial(_noisy_lqr, percent / 100),
        "LQR-v0",
        1000,
        about,
        fingerprint={"probability": percent / 100},
    )


# --- car -------------------------------------------------------------------------------------


def _nmpc() -> Policy:
    from mpd_gym.collect.nmpc import NMPC

    return NMPC(on_failure="report")


def _noisy_nmpc() -> Policy:
    return NoisyPolicy(_nmpc(), gym.make("CarUMaze-v0"), noise=DRIVING_NOISE)


def _random_driver() -> Policy:
    return RandomDriver(gym.make("CarUMaze-v0"))


def _arrived(episode: Episode) -> bool:
    """Whether an expert episode ended at the goal and not in a wall."""
    arrived = episode.successes is not None and episode.successes[-1]
    return bool(arrived and not episode.terminations[-1])


def _collect_car_expert(collection: Collection) -> Any:
    about = info(
        "nonlinear MPC (CasADi, Ipopt)",
        "U-turns through the maze; arrival within 32 steps, then standing still.",
        CAR_RETURNS,
    )
    return _record(collection, _nmpc, "CarUMaze-v0", 2000, about, accept=_arrived)


def _collect_car_noisy(collection: Collection) -> Any:
    about = info(
        "nonlinear MPC (CasADi, Ipopt) with smooth errors in the actions",
        f"U-turns through the maze with errors of up to {DRIVING_NOISE} of the largest action, "
        "for dynamics models.",
        CAR_RETURNS,
    )
    return _record(collection, _noisy_nmpc, "CarUMaze-v0", 1000, about)


def _collect_car_random(collection: Collection) -> Any:
    about = info(
        "smooth random actions",
        "Random driving that brakes before walls, for dynamics models.",
        CAR_RETURNS,
    )
    return _record(collection, _random_driver, "CarUMaze-v0", 1000, about)


# --- pendulum --------------------------------------------------------------------------------


def _trained_sac(
    collection: Collection, env_id: str, name: str, steps: int, wrappers: tuple[Any, ...] = ()
) -> Any:
    """Train a SAC, or resume its training; its zip stays in the folder of policies."""
    from mpd_gym.collect.sb3 import train_sb3

    folder = collection.policies
    check_writable(folder)
    return train_sb3(
        "sac",
        env_id,
        steps=collection.size(steps),
        seed=collection.seed,
        wrappers=wrappers,
        num_envs=COPIES,
        hyperparameters=SAC,
        log_dir=folder / "tensorboard" / name,
        save_path=folder / f"{name}.zip",
        checkpoint=folder / f"{name}-checkpoint.zip",
        progress=collection.progress,
    )


def _collect_constrained_pendulum(collection: Collection) -> Any:
    from mpd_gym.collect.sb3 import CostPenalty, replay_episodes
    from mpd_gym.collect.sb3_zip import SB3Policy

    env_id = "ConstrainedPendulum-v0"
    free = _trained_sac(collection, env_id, "sac-ConstrainedPendulum-v0", 100_000)
    penalty = functools.partial(CostPenalty, penalty=SAFE_PENALTY)
    safe = _trained_sac(collection, env_id, "safe-sac-ConstrainedPendulum-v0", 100_000, (penalty,))
    return write_dataset(
        collection.dataset_id,
        chain(replay_episodes(free), _played(SB3Policy(safe.policy), env_id, collection)),
        env_id=env_id,
        info=info(
            "SAC replay buffer and safe SAC",
            "All 100,000 training steps of a SAC that ignores the limit, then 300 episodes of one "
            f"trained with a penalty of {SAFE_PENALTY} on each step beyond it.",
            PENDULUM_RETURNS,
        ),
        overwrite=collection.overwrite,
        progress=collection.progress,
    )


def _played(policy: Any, env_id: str, collection: Collection) -> Iterator[Episode]:
    """Play 300 episodes of a stochastic policy."""
    env = gym.make(env_id)
    assert env.spec is not None
    job = Assignment(
        collection.dataset_id, env.spec, policy, collection.seed, False, env.observation_space
    )
    runner = Runner(job)
    for number in range(collection.size(300)):
        episode = runner.run(number).episode
        assert episode is not None  # nothing is filtered, and SB3 has no solver to fail
        yield episode
    runner.close()


def _collect_image_pendulum(collection: Collection) -> Any:
    from mpd_gym.collect.sb3 import replay_episodes

    model = _trained_sac(collection, "Pendulum-v1", "sac-Pendulum-v1", 100_000)
    return write_dataset(
        collection.dataset_id,
        _as_frames(replay_episodes(model)),
        env_id="ImagePendulum-v0",
        observation_space=spaces.Box(0, 255, (64, 64), np.uint8),
        frame_stack=FRAMES,
        info=info(
            "SAC replay buffer",
            "All training steps of a SAC that sees the state; frames are stored once and stacked "
            "when read.",
            PENDULUM_RETURNS,
        ),
        overwrite=collection.overwrite,
        progress=collection.progress,
    )


def _as_frames(episodes: Iterator[Episode]) -> Iterator[Episode]:
    """Show episodes of Pendulum-v1 as pictures."""
    for episode in episodes:
        rows = np.asarray(episode.observations, float)
        frames = draw(np.arctan2(rows[:, 1], rows[:, 0]))
        yield replace(episode, observations=frames, costs=None, successes=None)


RECIPES: dict[str, Recipe] = {
    recipe.dataset_id: recipe
    for recipe in (
        *(
            Recipe(
                f"mpd_gym/lqr/noisy-p{percent}-v0",
                f"LQR-v0: 1000 trajectories of the optimal gain, {percent} % of the steps noisy",
                functools.partial(_collect_lqr, percent),
            )
            for percent in (10, 20, 30, 40, 80)
        ),
        Recipe(
            "mpd_gym/car-umaze/expert-v0",
            "CarUMaze-v0: 2000 trajectories of nonlinear MPC",
            _collect_car_expert,
        ),
        Recipe(
            "mpd_gym/car-umaze/noisy-v0",
            "CarUMaze-v0: 1000 trajectories of nonlinear MPC with errors in its actions",
            _collect_car_noisy,
        ),
        Recipe(
            "mpd_gym/car-umaze/random-v0",
            "CarUMaze-v0: 1000 trajectories of smooth random actions",
            _collect_car_random,
        ),
        Recipe(
            "mpd_gym/constrained-pendulum/mixed-v0",
            "ConstrainedPendulum-v0: SAC's replay buffer (100k steps) and 300 safe episodes",
            _collect_constrained_pendulum,
        ),
        Recipe(
            "mpd_gym/image-pendulum/replay-v0",
            "ImagePendulum-v0: SAC's replay buffer (100k steps) as frames",
            _collect_image_pendulum,
        ),
        Recipe(
            "mpd_gym/latent-pendulum/replay-v0",
            "LatentPendulum-v0: the same replay buffer as latents of the shipped encoder",
            "mpd_gym.latent.recipe:collect_latent_pendulum",
        ),
    )
}
