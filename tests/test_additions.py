"""One of each kind is added as CONTRIBUTING.md says, in the files and lines it names, and used."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import TINY, source, tiny_agent
from torch import Tensor

import mpd_gym
from mpd_gym import MPDiffuserAgent, evaluate, load_agent, load_episodes, preset, record
from mpd_gym import agents as registry
from mpd_gym.collect import recipes
from mpd_gym.collect.scripted import SmoothRandom
from mpd_gym.diffusion.composition import COMPOSITIONS, Parts
from mpd_gym.diffusion.samplers import SAMPLERS, Sampler, draw
from mpd_gym.diffusion.schedule import NoiseSchedule
from mpd_gym.rankers import RANKERS, custom
from mpd_gym.types import Noise, Step

POINT = '''
import gymnasium as gym
import numpy as np

class PointEnv(gym.Env):
    """Push a point to the origin of a line."""

    observation_space = gym.spaces.Box(-10.0, 10.0, (1,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1.0, 1.0, 1)
        return self.x.copy(), {}

    def step(self, action):
        self.x = self.x + 0.1 * np.clip(np.asarray(action, float), -1.0, 1.0)
        return self.x.copy(), -float(abs(self.x[0])), False, False, {}
'''
PEER = '''
from dataclasses import dataclass
from mpd_gym.agents.config import DiffusionConfig
from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.diffusion import sample

@dataclass(frozen=True)
class CautiousConfig(DiffusionConfig):
    """A planner that plans half of every action."""

    own = ("planner",)
    share: float = 0.5
    initial_state: str = "film"

    @classmethod
    def changes(cls, base, env_id):
        return {"share": 0.25}

class CautiousAgent(DiffusionAgent):
    name = "cautious"
    config_type = CautiousConfig

    def _reverse(self, request, levels, start):
        step = self._composed(request, levels, self._known(request.initial))
        plans = sample(step, start, levels, request.noise)
        plans[..., self.layout.states :] *= self.config.share
        return plans

    def _task(self, role):
        return self._denoising_task(role)
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def agent() -> MPDiffuserAgent:
    return tiny_agent("LQR-v0")


def test_an_environment_is_a_file_and_a_registration(place: Path) -> None:
    (place / "point.py").write_text(POINT)
    gym.register("test/Point-v0", "point:PointEnv", max_episode_steps=20)
    try:
        env = gym.make("test/Point-v0")
        check_env(env.unwrapped, skip_render_check=True)
        policy = SmoothRandom(env.action_space, env.observation_space)
        data = record(policy, "test/Point-v0", "test/point-v0", episodes=4, seed=0, progress=False)
        planner = MPDiffuserAgent.fit(load_episodes(data), TINY, progress=False)
        assert evaluate(planner, "test/Point-v0", seeds=2).lengths.tolist() == [20, 20]
    finally:
        gym.registry.pop("test/Point-v0")


def test_a_data_recipe_is_a_function_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(collection: recipes.Collection) -> Any:
        env = gym.make("LQR-v0")
        return record(
            SmoothRandom(env.action_space, env.observation_space),
            "LQR-v0",
            collection.dataset_id,
            episodes=collection.size(40),
            seed=collection.seed,
            progress=False,
        )

    recipe = recipes.Recipe("test/wandering-v0", "LQR-v0: random actions", run)
    monkeypatch.setitem(recipes.RECIPES, recipe.dataset_id, recipe)
    assert recipes.collect("test/wandering-v0", fraction=0.05).total_episodes == 2


def test_a_peer_is_a_file_and_a_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "cautious.py").write_text(PEER)
    monkeypatch.setitem(registry.AGENTS, "cautious", "cautious:CautiousAgent")
    config = preset("laptop", "LQR-v0", "cautious")
    assert type(config) is registry.CautiousConfig and config.share == 0.25
    small = {name: getattr(TINY, name) for name in ("horizon", "unet", "training", "sampling")}
    kind = registry.CautiousAgent
    bold, shy = (
        kind.fit(source("LQR-v0"), registry.CautiousConfig(share=share, **small), progress=False)
        for share in (1.0, 0.5)
    )
    one = np.zeros(2)
    whole, half = (each.predict(one, deterministic=True)[1].plan for each in (bold, shy))
    np.testing.assert_allclose(half, whole * [1, 1, 0.5], atol=1e-6)  # two states, an action
    shy.save(place / "shy.safetensors")
    again = load_agent(place / "shy.safetensors")
    assert type(again) is kind and again.config == shy.config
    np.testing.assert_array_equal(again.predict(one, deterministic=True)[1].plan, half)


def test_a_sampler_is_a_function_and_a_row(
    agent: MPDiffuserAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jump(
        noisy: Tensor, clean: Tensor, k: int, k_next: int, schedule: NoiseSchedule
    ) -> tuple[Tensor, float]:
        return clean, schedule.noise(k_next)

    row = Sampler(lambda eta: jump, spacing="log_snr")
    monkeypatch.setitem(SAMPLERS, "jump", row)
    jumping = agent.with_options(sampler="jump", num_steps=3)
    assert jumping.options.level_spacing == "log_snr"
    usual = agent.with_options(num_steps=3, spacing="log_snr")
    one = np.zeros(2)
    found, other = (each.plan(one, deterministic=True).actions for each in (jumping, usual))
    assert np.isfinite(found).all() and not np.array_equal(found, other)


def test_a_composition_is_a_function_and_an_entry(
    agent: MPDiffuserAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def dynamics_first(parts: Parts) -> Step:
        def step(trajectory: Tensor, k: int, k_next: int, noise: Noise) -> Tensor:
            calls.append(k)
            assert parts.dynamics is not None
            states = parts.dynamics(trajectory, k)
            trajectory = torch.cat((states, trajectory[..., parts.nx :]), dim=-1)
            clean = parts.planner(trajectory, k)
            mean, std = parts.move(trajectory, clean, k, k_next, parts.schedule)
            return draw(mean, std, noise, parts.temperature)

        return step

    monkeypatch.setitem(COMPOSITIONS, "dynamics_first", dynamics_first)
    plan = agent.with_options(composition="dynamics_first").plan(np.zeros(2))
    assert np.isfinite(plan.actions).all()
    assert calls == list(range(TINY.diffusion_steps, 0, -1))


def test_a_ranker_is_a_function_and_an_entry(
    agent: MPDiffuserAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    gentlest = custom(lambda observations, actions: -np.abs(actions).sum(axis=(1, 2)))
    monkeypatch.setitem(RANKERS, "gentlest", gentlest)
    plan = agent.with_options(ranker="gentlest", num_candidates=8).plan(np.zeros(2))
    assert plan.chosen == np.abs(plan.actions).sum(axis=(1, 2)).argmin()


def test_a_study_is_a_file_and_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studies import STUDIES, Study, run_study
    from studies.figures import Curve, Panel, curves
    from studies.report import Report, Table
    from studies.runner import Scope

    module: Any = ModuleType("studies.counting")
    module.study = lambda run: Report(
        "Counting",
        "How is it counted?",
        Table("", ["n"], [["3"]]),
        curves([Panel("", {"planner alone": Curve([0.0, 1.0], [1.0, 2.0])}, "x", "y")]),
        "What to see.",
        "One by one.",
    )
    monkeypatch.setitem(sys.modules, "studies.counting", module)
    monkeypatch.setitem(STUDIES, "counting", Study("counting", "counts", "1 s"))
    assert "How is it counted?" in run_study("counting", Scope(tmp_path, (0,), 1))


def test_contributing_names_each_of_them() -> None:
    text = (Path(mpd_gym.__file__).parents[1] / "CONTRIBUTING.md").read_text()
    for kind in (
        *("environment", "data recipe", "peer", "sampler", "composition", "ranker", "study"),
        *("benchmark", "command", "network", "fast path"),
    ):
        assert f"| {kind} |" in text
