"""Model Predictive Diffuser (Balim, Li and Du, arXiv 2512.08280).

Algorithm 1 is the composition ``"alternating"`` in `mpd_gym.diffusion.composition`, Algorithm 2 the
ranker ``"within_budget"`` in `mpd_gym.rankers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from mpd_gym.agents.config import FactoredConfig
from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.agents.losses import DenoisingTask
from mpd_gym.agents.planning import Request
from mpd_gym.diffusion import sample

__all__ = ["MPDiffuserAgent", "MPDiffuserConfig"]


@final
@dataclass(frozen=True)
class MPDiffuserConfig(FactoredConfig):
    """Everything that defines a trained MPDiffuser, and how it samples by default.

    The defaults are the paper's (appendix B), except the normaliser, the padding and the null
    condition; `mpd_gym.agents.presets` has laptop-size ones for each environment. Round-trips
    through ``dataclasses.asdict`` and JSON. The other fields are those of `FactoredConfig` and
    `DiffusionConfig`.

    Attributes:
        initial_state: ``"film"``, or ``"inpaint"`` with plans of H − 1 steps (appendix D).
    """

    own = ("planner", "dynamics")
    composed = True

    initial_state: str = "film"

    @classmethod
    def changes(cls, base: FactoredConfig, env_id: str) -> dict[str, Any]:
        """Its own composition: the rest of the preset is made for it."""
        return {"sampling": base.sampling}


@final
class MPDiffuserAgent(DiffusionAgent[MPDiffuserConfig]):
    """Planner and dynamics model sample candidate plans together; a ranker picks one.

    Make one with `fit` or `load`. See `mpd_gym.agents.base.Agent` for `predict`, `plan`,
    `with_options` and the functions that can be set at run time,
    `mpd_gym.agents.trained.TrainedAgent` for `fit`, `save` and `load`, and
    `mpd_gym.agents.diffusion_agent.DiffusionAgent` for `finetune_dynamics`.
    """

    name = "mpdiffuser"
    config_type = MPDiffuserConfig

    def _reverse(self, request: Request, levels: Sequence[int], start: Tensor) -> Tensor:
        step = self._composed(request, levels, self._known(request.initial))
        return sample(step, start, levels, request.noise)

    def _task(self, role: str) -> DenoisingTask:
        return self._denoising_task(role)
