"""Walker2dTorqueDefect-v0: Gymnasium's Walker2d with one weak joint."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from mpd_gym.envs.wrappers import TorqueDefect, states_metadata
from mpd_gym.errors import check_choice, require

__all__ = ["make_walker2d_torque_defect"]

VERSIONS = ("v5", "v4")
RIGHT_FOOT, LIMIT = 2, 0.5
METADATA = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"], "render_fps": 125}


@states_metadata(METADATA)
def make_walker2d_torque_defect(
    render_mode: str | None = None,
    *,
    version: str = "v5",
    joint: int = RIGHT_FOOT,
    limit: float = LIMIT,
    **walker: Any,
) -> TorqueDefect:
    """Walk with a right foot whose motor has lost half of its torque.

    ## Description
    Gymnasium's Walker2d-v5 inside the wrapper `TorqueDefect`, which clips the right-foot torque to
    half of its range (paper: MPDiffuser, section 4.1; D-MPC, section 5.3).

    ## Action Space
    As in Walker2d, `Box(-1, 1, (6,), float32)`, so every policy for Walker2d runs.
    `info["applied_action"]` is the clipped action; Walker2d's control cost counts it.

    | Num | Action | Min | Max | Min that acts | Max that acts | Unit |
    |-----|--------|-----|-----|---------------|---------------|------|
    | 0   | right thigh | -1 | 1 | -1   | 1   | N·m (before the gear) |
    | 1   | right leg   | -1 | 1 | -1   | 1   | N·m |
    | 2   | right foot  | -1 | 1 | -0.5 | 0.5 | N·m |
    | 3   | left thigh  | -1 | 1 | -1   | 1   | N·m |
    | 4   | left leg    | -1 | 1 | -1   | 1   | N·m |
    | 5   | left foot   | -1 | 1 | -1   | 1   | N·m |

    ## Observation Space
    As in Walker2d, `Box(-inf, inf, (17,), float64)`.

    | Num | Observation | Min | Max | Unit |
    |-----|-------------|-----|-----|------|
    | 0   | height of the torso | -inf | inf | m |
    | 1   | angle of the torso  | -inf | inf | rad |
    | 2 … 7 | angles of the joints, in the order of the actions | -inf | inf | rad |
    | 8   | forward velocity of the torso | -10 | 10 | m/s |
    | 9   | upward velocity of the torso  | -10 | 10 | m/s |
    | 10  | angular velocity of the torso | -10 | 10 | rad/s |
    | 11 … 16 | angular velocities of the joints | -10 | 10 | rad/s |

    ## Rewards
    As in Walker2d: 1 for being healthy, plus the forward velocity, minus 0.001·|applied action|².

    ## Starting State
    As in Walker2d: standing, with uniform noise of ±0.005 on every position and velocity.

    ## Episode End
    Terminated when the torso leaves 0.8 … 2.0 m or ±1 rad. Truncated after 1000 steps.

    ## Arguments
    `version`: `"v5"` or `"v4"` of Walker2d. `joint`: weak action dimension, default 2. `limit`:
    bound of its action, [−limit, limit], default 0.5. All other keywords, also `render_mode`, go
    to Gymnasium's Walker2d. Needs MuJoCo: `pip install 'mpd-gym[mujoco]'`. Render modes other than
    `"human"` work without a display: MuJoCo then draws with EGL, unless `MUJOCO_GL` is set.

    ```python
    >>> import gymnasium as gym
    >>> env = gym.make("mpd_gym:Walker2dTorqueDefect-v0", version="v4", joint=5, limit=0.3)
    ```

    Raises:
        MissingExtraError: If MuJoCo is not installed.
        ConfigError: If the version is unknown.
        InputError: If there is no such joint, or the limit is negative.

    ## Version History
    * v0: first version.
    """
    require("mujoco", "mujoco", "Walker2dTorqueDefect-v0")
    check_choice("version", version, VERSIONS)
    if render_mode not in (None, "human") and not _has_display():
        os.environ.setdefault("MUJOCO_GL", "egl")  # GLFW, the first choice, fails without a display
    module = importlib.import_module(f"gymnasium.envs.mujoco.walker2d_{version}")
    return TorqueDefect(module.Walker2dEnv(render_mode=render_mode, **walker), joint, limit)


def _has_display() -> bool:
    return sys.platform != "linux" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
