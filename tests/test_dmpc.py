"""D-MPC: actions first, then the states that they lead to, then their value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, source
from torch import Tensor

from mpd_gym.agents import DMPCAgent, DMPCConfig
from mpd_gym.agents.losses import DenoisingTask, ValueTask
from mpd_gym.datasets import WindowSampler, fit_conditions, fit_normalizers
from mpd_gym.errors import ConfigError
from mpd_gym.types import Denoiser

LQR = "LQR-v0"
FIELDS: dict[str, Any] = {
    name: getattr(TINY, name)
    for name in ("training", "sampling", "validation_fraction", "horizon", "unet",
                 "diffusion_steps")
}  # fmt: skip
CONFIG = DMPCConfig(conditions=("return",), **FIELDS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained() -> DMPCAgent:
    return DMPCAgent.fit(source(LQR), CONFIG, progress=False)


@pytest.fixture
def agent(trained: DMPCAgent) -> DMPCAgent:
    return trained.with_options()


class Stubs(DMPCAgent):  # type: ignore[misc]
    """Exact denoisers: actions of 0.5, and states that sum up the actions they are shown."""

    seen: list[Tensor]

    def _denoiser(self, role: str, request: Any, levels: Any, *_: Any, **__: Any) -> Denoiser:
        def propose(actions: Tensor, k: int) -> Tensor:
            assert actions.shape[-1] == 1
            return torch.full_like(actions, 0.5)

        def predict(trajectory: Tensor, k: int) -> Tensor:
            actions = trajectory[..., 2:]
            self.seen.append(actions)
            return actions.cumsum(dim=1).expand(-1, -1, 2) / 100

        return propose if role == "proposal" else predict


@pytest.mark.parametrize("warm", [False, True])
def test_states_are_predicted_for_finished_actions(trained: DMPCAgent, warm: bool) -> None:
    agent = Stubs(trained.parts).with_options(num_candidates=3, temperature=1.0, warm_start_steps=2)
    agent.seen = []
    _, state = agent.predict(np.array([0.1, 0.0]))
    if warm:
        agent.seen.clear()
        agent.predict(np.array([0.1, 0.0]), state)
    assert len(agent.seen) == (2 if warm else CONFIG.diffusion_steps)
    for actions in agent.seen:
        np.testing.assert_allclose(actions, 0.5, atol=1e-6)  # at every level
    plan = agent.plan(np.array([0.1, 0.0]))
    steps = np.arange(1, CONFIG.horizon + 1)[:, None]
    states = trained.normalizers.observation.unnormalize(np.repeat(0.005 * steps, 2, axis=1))
    np.testing.assert_allclose(plan.observations, np.stack([states] * 3), atol=1e-5)


def windows() -> WindowSampler:
    data = source(LQR)
    normalizers = fit_normalizers(data, "minmax")
    return WindowSampler(
        data, CONFIG.windows, normalizers, fit_conditions(data, CONFIG.windows, normalizers)
    )


def test_each_network_learns_what_it_samples(agent: DMPCAgent) -> None:
    rng, data = np.random.default_rng(0), windows()
    proposal, dynamics, value = (agent._task(role) for role in ("proposal", "dynamics", "value"))
    assert isinstance(proposal, DenoisingTask) and isinstance(dynamics, DenoisingTask)
    examples = proposal.examples(data.sample(4, rng))
    assert examples.trajectory.shape == (4, CONFIG.horizon, 1) and examples.initial.shape == (4, 2)
    assert not examples.fixed.any()
    assert examples.executed.nonzero().tolist() == [[0, 0]]
    examples = dynamics.examples(data.sample(4, rng))
    assert examples.trajectory.shape == (4, CONFIG.horizon, 3)
    assert examples.fixed[:, 2:].all() and not examples.fixed[:, :2].any()
    assert isinstance(value, ValueTask)
    rows = value.examples(data.sample(4, rng))
    shown: list[Tensor] = []
    network = agent.models["value"]
    network.register_forward_pre_hook(lambda _, inputs: shown.extend(inputs))
    loss = value(network, rows, torch.Generator())["loss"]
    assert torch.equal(shown[0], rows["trajectory"]) and (shown[1] == 1).all()  # no noise
    expected = (network(*shown[:2]) - rows["value"]).square().mean()
    torch.testing.assert_close(loss, expected)


def test_the_highest_value_is_executed_or_the_callers_reward(agent: DMPCAgent) -> None:
    agent = agent.with_options(num_candidates=6, temperature=1.0)
    plan = agent.plan(np.array([0.1, 0.0]))
    assert plan.returns is not None and len(set(plan.returns.tolist())) == 6
    assert plan.chosen == plan.returns.argmax()
    agent.set_reward(lambda states, actions, after: -np.abs(actions[..., 0]))
    plan = agent.plan(np.array([0.1, 0.0]))
    discounts = CONFIG.discount ** np.arange(CONFIG.horizon)
    np.testing.assert_allclose(plan.returns, -np.abs(plan.actions[..., 0]) @ discounts)
    assert plan.returns is not None and plan.chosen == plan.returns.argmax()


def test_the_proposal_alone_follows_conditions() -> None:
    config = DMPCConfig(conditions=("return", "final_state"), **FIELDS)  # type: ignore[arg-type]
    agent = DMPCAgent.fit(source(LQR), config, progress=False)
    assert agent.models["proposal"].config.conditions == (("final_state", 2),)
    assert agent.models["dynamics"].config.conditions == ()
    here, there = (
        agent.with_options(condition_values={"final_state": goal}, guidance_scale=1.0).predict(
            [0.1, 0.0], deterministic=True
        )[0]
        for goal in ((0.0, 0.0), (0.1, 0.1))
    )
    assert not np.array_equal(here, there)


def test_dynamics_learn_on_while_the_rest_stays() -> None:
    agent = DMPCAgent.fit(source(LQR), CONFIG, progress=False)
    before = {role: next(model.parameters()).clone() for role, model in agent.models.items()}
    agent.finetune_dynamics(source(LQR, episodes=3), 10, progress=False)
    same = {
        role: torch.equal(before[role], next(model.parameters()))
        for role, model in agent.models.items()
    }
    assert same == {"proposal": True, "dynamics": False, "value": True}


@pytest.mark.parametrize("conditions", [("cost",), ("return", "cost")])
def test_conditions_that_it_cannot_follow_are_refused(conditions: Any) -> None:
    with pytest.raises(ConfigError, match="one 'return' at most"):
        DMPCConfig(conditions=conditions)
