"""Another dynamics model beside the same planner, for studies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import PENDULUM, TINY, play, source, tiny_agent

from mpd_gym import MPDiffuserAgent
from mpd_gym.agents.presets import preset
from mpd_gym.diffusion import LossConfig
from mpd_gym.errors import ConfigError
from studies.networks import with_new_dynamics


def test_a_new_dynamics_model_stands_beside_the_same_planner() -> None:
    pendulum = tiny_agent(PENDULUM)
    before = {
        name: value.clone() for name, value in pendulum.models["dynamics"].state_dict().items()
    }
    config = replace(pendulum.config, dynamics_conditions=False)
    other = with_new_dynamics(pendulum, play(PENDULUM), config, progress=False)
    assert other.models["planner"] is pendulum.models["planner"]
    assert other.models["dynamics"].config.conditions == ()
    for name, value in pendulum.models["dynamics"].state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ConfigError, match="another planner"):
        with_new_dynamics(pendulum, play(PENDULUM), replace(config, horizon=16), progress=False)


@pytest.mark.parametrize("env_id", ["LQR-v0", "CarUMaze-v0"])
def test_what_the_data_settled_stays_settled(env_id: str) -> None:
    config = replace(
        TINY, conditions=preset("laptop").conditions, loss=LossConfig(prediction="auto")
    )
    agent = MPDiffuserAgent.fit(source(env_id), config, progress=False)
    again = with_new_dynamics(agent, source(env_id), config, progress=False)
    assert again.config.conditions == agent.config.conditions
    assert again.config.loss.prediction == agent.config.loss.prediction == "x0"
    other = replace(config, loss=LossConfig(prediction="noise"))
    with pytest.raises(ConfigError, match=r"another planner.*predicts x0"):
        with_new_dynamics(agent, source(env_id), other, progress=False)
