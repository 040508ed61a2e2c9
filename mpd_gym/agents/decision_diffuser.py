"""Decision Diffuser (Ajay et al. 2023): states by diffusion, actions by inverse dynamics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from torch import Tensor

from mpd_gym.agents.config import INVERSE_DYNAMICS, DiffusionConfig, FactoredConfig
from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.agents.losses import DenoisingTask, states_only
from mpd_gym.agents.planning import Request
from mpd_gym.diffusion import LossConfig, sample

__all__ = ["DecisionDiffuserAgent", "DecisionDiffuserConfig"]


@final
@dataclass(frozen=True)
class DecisionDiffuserConfig(DiffusionConfig):
    """Configuration of Decision Diffuser. The other fields are those of `DiffusionConfig`.

    Attributes:
        initial_state: ``"inpaint"`` with plans of H − 1 steps, as published, or ``"film"``: in
            closed loop on the car, 62 and 100 % park (``python -m studies car-umaze``).
        loss: Options of the denoising loss; the network predicts x̂_0 by default.
        inverse_dynamics: Always learned: plans hold no actions.
    """

    own = ("planner", INVERSE_DYNAMICS)
    plans_actions = False

    initial_state: str = "inpaint"
    loss: LossConfig = field(default_factory=lambda: LossConfig(prediction="x0"))
    inverse_dynamics: bool = True

    @classmethod
    def changes(cls, base: FactoredConfig, env_id: str) -> dict[str, Any]:
        """It inpaints x_0, so that its plans are a step shorter, and predicts x̂_0.

        The inverse dynamics see all steps of 64 windows at a time, as the authors' do.
        """
        return {
            "initial_state": "inpaint",
            "loss": replace(base.loss, prediction="x0"),
            "inverse_dynamics": True,
            "regressor_training": replace(base.regressor_training, batch_size=64),
            "sampling": replace(
                base.sampling,
                composition="planner_only",
                action_chunk=min(base.sampling.action_chunk, base.horizon - 1),
            ),
        }


@final
class DecisionDiffuserAgent(DiffusionAgent[DecisionDiffuserConfig]):
    """A planner of states; an MLP on (x_t, x_{t+1}) gives the actions.

    Make one with `fit` or `load`.
    """

    name = "decision_diffuser"
    config_type = DecisionDiffuserConfig

    def _reverse(self, request: Request, levels: Sequence[int], start: Tensor) -> Tensor:
        step = self._composed(request, levels, self._known(request.initial))
        return sample(step, start, levels, request.noise)

    def _task(self, role: str) -> DenoisingTask:
        return self._denoising_task(role, rearrange=states_only)
