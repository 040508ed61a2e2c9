"""LatentPendulum-v0: ImagePendulum-v0 seen through the shipped encoder."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from mpd_gym.envs.image_pendulum import METADATA, make_image_pendulum
from mpd_gym.envs.wrappers import states_metadata
from mpd_gym.errors import InputError
from mpd_gym.latent.encoder import ImageEncoder
from mpd_gym.training.loop import torch_threads
from mpd_gym.types import Array

__all__ = ["LatentObservation", "make_latent_pendulum"]


@states_metadata(METADATA)
def make_latent_pendulum(
    render_mode: str | None = None, encoder: str = "ImagePendulum-v0", **constants: float
) -> LatentObservation:
    """Swing a pendulum up and balance it, seeing the latents of its pictures.

    ## Description
    `ImagePendulum-v0` inside the wrapper `LatentObservation`. An encoder, trained to reconstruct
    the stacks of four frames and to make the next latent predictable, turns them into latents
    (paper: MPDiffuser, section 4.3).

    ## Action Space
    `Box(-2, 2, (1,), float32)`; values outside are clipped.

    | Num | Action | Min | Max | Unit |
    |-----|--------|-----|-----|------|
    | 0   | torque, counter-clockwise | -2 | 2 | N·m |

    ## Observation Space
    `Box(-√32, √32, (32,), float32)`

    | Num | Observation | Min | Max | Unit |
    |-----|-------------|-----|-----|------|
    | 0 … 31 | latent of the last four frames, of mean 0 and mean square 1 | -√32 | √32 | – |

    `info["state"]`, float64, is the true state that the newest frame shows:

    | Num | State | Min | Max | Unit |
    |-----|-------|-----|-----|------|
    | 0   | angle, 0 is upright, not wrapped | -inf | inf | rad |
    | 1   | angular velocity | -8 | 8 | rad/s |

    ## Rewards
    −(angle² + 0.1·velocity² + 0.001·torque²) at the state before the step, angle in [−π, π).

    ## Starting State
    As in `ImagePendulum-v0`: angle uniform in [−π, π], velocity in [−1, 1] rad/s; all frames of
    the first stack are equal. `reset(options=…)` takes the same options.

    ## Episode End
    Truncated after 200 steps, never terminated.

    ## Arguments
    `encoder`: path of an encoder's file, or the id of an environment with a shipped encoder. `g`,
    `m`, `l`, `dt`, `max_speed`, `max_torque` and `render_mode` as in `ImagePendulum-v0`.

    ```python
    >>> import gymnasium as gym
    >>> env = gym.make("mpd_gym:LatentPendulum-v0")
    >>> latent, info = env.reset(seed=0)
    ```

    Raises:
        InputError: If a constant is out of range.
        CheckpointError: If there is no such encoder, or its file is damaged.

    ## Version History
    * v0: first version.
    """
    return LatentObservation(make_image_pendulum(render_mode, **constants), encoder)


class LatentObservation(gym.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """Observe the latents of an environment with stacked frames.

    Encoding uses one thread. So equal frames give equal bits for any thread setting of torch, and
    a forked worker of a vector environment does not wait for threads that it lacks.

    Args:
        env: Environment with the encoder's observations, such as one inside `StackedFrames`.
        encoder: The encoder; or its path or id for `ImageEncoder.load`, with which the
            environment's specification can be written as JSON.

    Raises:
        InputError: If the observations do not fit the encoder.
        CheckpointError: If there is no such encoder, or its file is damaged.
    """

    def __init__(self, env: gym.Env[Any, Any], encoder: ImageEncoder | str) -> None:
        RecordConstructorArgs.__init__(self, encoder=encoder)
        super().__init__(env)
        loaded = encoder if isinstance(encoder, ImageEncoder) else ImageEncoder.load(encoder)
        if env.observation_space != loaded.image_space:
            raise InputError(
                f"env: the encoder takes observations of {loaded.image_space}, the environment "
                f"has {env.observation_space}"
            )
        self.encoder = loaded
        self.observation_space = loaded.latent_space

    def observation(self, observation: Any) -> Array:
        """Encode one stack, float32 ``[latent_dim]``."""
        with torch_threads(1):
            return self.encoder.encode(observation)
