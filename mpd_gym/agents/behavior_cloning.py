"""Behaviour cloning: an MLP from observation and conditions to the recorded action."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from mpd_gym.agents.config import AgentConfig, FactoredConfig, Layout, Sizes
from mpd_gym.agents.losses import MLPTask, TrainingTask
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.planning import Request, given_columns
from mpd_gym.agents.trained import TrainedAgent
from mpd_gym.datasets import WindowConfig
from mpd_gym.models import MLP, MLPConfig
from mpd_gym.training import TrainingConfig

__all__ = ["BehaviorCloningAgent", "BehaviorCloningConfig"]


@final
@dataclass(frozen=True, kw_only=True)
class BehaviorCloningConfig(AgentConfig):
    """Configuration of behaviour cloning. The other fields are those of `AgentConfig`.

    To clone safe episodes only, fit it to
    ``load_episodes(dataset).where(cost_at_most(0))``.

    Attributes:
        conditions: Inputs beside the observation, such as ``"goal"`` or ``"final_state"``.
        hidden: Widths of the hidden layers.
        training: Of the policy.
        sampling: Of its options, those that give values to conditions matter; nothing is sampled.
    """

    hidden: tuple[int, ...] = (256, 256)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=20_000, batch_size=256, learning_rate=1e-3)
    )

    @classmethod
    def changes(cls, base: FactoredConfig, env_id: str) -> dict[str, Any]:
        """As many optimisation steps, each on 256 transitions; one action at a time."""
        return {
            "conditions": tuple(spec for spec in base.conditions if spec.kind != "cost"),
            "training": replace(base.training, batch_size=256),
            "sampling": replace(
                base.sampling,
                num_candidates=1,
                action_chunk=1,
                num_steps=None,
                warm_start_steps=0,
                budget=None,
            ),
            "reward_model": False,
            "cost_model": False,
            "binary_costs": False,
            "termination_model": False,
        }

    @property
    def windows(self) -> WindowConfig:
        """Shape of the training windows."""
        return WindowConfig(1, self.discount, self.padding, self.conditions)

    def networks(self) -> list[str]:
        """The policy, and the model of the state that its action leads to."""
        return ["policy", "successor"]

    def network(self, role: str, sizes: Sizes) -> nn.Module:
        """Make one of them."""
        nx, nu = sizes.nx, sizes.nu
        if role == "policy":
            return MLP(MLPConfig(nx + sum(sizes.conditions.values()), nu, self.hidden))
        return MLP(MLPConfig(nx + nu, nx, self.hidden))

    def layout(self, sizes: Sizes) -> Layout:
        """Shape of a plan: one step."""
        return Layout(rows=1, states=sizes.nx, actions=sizes.nu, levels=0)

    def resolved(self, sizes: Sizes) -> Self:
        """This configuration: nothing depends on sizes."""
        return self

    def _check(self, sizes: Sizes) -> None:
        MLPConfig(1, 1, self.hidden)  # refuses wrong widths


@final
class BehaviorCloningAgent(TrainedAgent[BehaviorCloningConfig]):
    """A deterministic policy, the mean of the recorded actions (squared error).

    Its plans are one step long. The state that they show is predicted by a second MLP,
    which has no influence on the action. All candidates are equal.
    """

    name = "behavior_cloning"
    config_type = BehaviorCloningConfig

    def _sample(self, request: Request) -> Tensor:
        names = [spec.name for spec in self.config.conditions]
        values = given_columns(request, self.conditions, names)
        policy, successor = self.models["policy"], self.models["successor"]
        low, high = (
            torch.as_tensor(bound, dtype=torch.float32, device=self.device)
            for bound in self.normalizers.action.clip_range
        )
        action = torch.clamp(policy(request.initial, values), low, high)
        row = torch.cat((successor(request.initial, action), action), dim=-1)
        return row[:, None].repeat_interleave(self.options.num_samples, 0)

    def _check_options(self, options: SamplingConfig) -> None:
        """Every option is possible: those of sampling change nothing."""

    def _task(self, role: str) -> TrainingTask:
        return MLPTask(role)
