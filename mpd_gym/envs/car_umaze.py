"""CarUMaze-v0: goal-conditioned driving with a kinematic bicycle through a U-shaped maze."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode

from mpd_gym.envs.batched import BatchedEnv, Infos
from mpd_gym.envs.car_model import (
    CarUMazeParameters,
    bicycle_step,
    collides,
    components,
    draw_starts,
    drive,
    footprint,
    goal_distance,
    goal_reward,
    inverse_transition,
    path_length,
    touches_wall,
    transition,
)
from mpd_gym.envs.car_picture import Scene, paint, view
from mpd_gym.envs.checks import checked_array, checked_options
from mpd_gym.envs.drawing import RENDER_MODES, Renderer
from mpd_gym.envs.plans import checked_plans
from mpd_gym.errors import InputError
from mpd_gym.types import Array, BoolArray

__all__ = [
    "CarUMazeEnv",
    "CarUMazeParameters",
    "CarUMazeVectorEnv",
    "bicycle_step",
    "collides",
    "drive",
    "footprint",
    "inverse_transition",
    "path_length",
    "transition",
]

_DRAWS = 6  # uniform numbers for each start
_FPS = 10


class CarUMazeEnv(gymnasium.Env[Any, Array]):
    """A car drives through a U-shaped maze to a goal in the other arm.

    ## Description
    Two parallel corridors, 3 m wide, their centre lines 8 m long and 4 m apart, are joined at one
    end (at large x). The car is a kinematic bicycle, with its reference point (x, y) in the middle
    of the rear axle:

    x' = v cos θ, y' = v sin θ, θ' = v tan δ / wheelbase, v' = acceleration, δ' = steering rate.

    One step of 0.3 s is three substeps of classical RK4. In each substep speed and steering angle
    follow straight ramps that end at their bounds at the latest, so the bounds hold at every
    instant. Walls do not act on the car: an observation is always `transition(state, action)` of
    the previous one. The task is from the MPDiffuser paper, appendix E.

    ## Action Space
    `Box([-3, -1.5], [3, 1.5], (2,), float32)`; values outside are clipped, on a copy.

    | Num | Action        | Min  | Max | Unit  |
    |-----|---------------|------|-----|-------|
    | 0   | acceleration  | -3   | 3   | m/s²  |
    | 1   | steering rate | -1.5 | 1.5 | rad/s |

    ## Observation Space
    A `Dict` of three float64 boxes. `achieved_goal` is (x, y), `desired_goal` the goal's (x, y),
    in m, and `observation`:

    | Num | Observation        | Min  | Max | Unit |
    |-----|--------------------|------|-----|------|
    | 0   | x of the rear axle | -inf | inf | m    |
    | 1   | y of the rear axle | -inf | inf | m    |
    | 2   | heading, not wrapped | -inf | inf | rad |
    | 3   | speed              | -1   | 4   | m/s  |
    | 4   | steering angle     | -0.6 | 0.6 | rad  |

    ## Rewards
    `reward_type="sparse"`: 0 if the distance to the goal is less than 1 m, else −1. `"dense"`:
    minus that distance. `compute_reward` gives it for any goals, as in Gymnasium-Robotics. Rewards
    are never positive, so a collision, which ends the episode, can pay: judge by `is_success`.

    ## Starting State
    In either arm with equal chance, at rest, steering straight, heading for the bend within
    ±0.1 rad; the goal is in the other arm. Both are up to 0.5 m from the centre line and at least
    2 m before the bend's centre line. The length of the centre line between them is uniform in
    12 … 20 m, and so is the start's share of it. `reset(options={"state": …, "goal": …})` sets the
    state `[5]`, the goal `[2]` or both exactly. If only one is given, the other is drawn as above,
    in the other arm, so the path may be shorter or longer.

    ## Episode End
    Terminated when the car's footprint, 1.4 m × 0.7 m from 0.2 m behind the rear axle, touches a
    wall at the end of a substep. Truncated after 64 steps. Reaching the goal does not end it.
    ``info["is_success"]`` says whether the distance to the goal is less than 1 m,
    ``info["collision"]`` whether the car touched a wall; `reset` gives them too.

    ## Arguments
    `render_mode`: `"rgb_array"` or `"human"`. Every constant above is a keyword argument: the
    attributes of `CarUMazeParameters`, for example `wheelbase`, `max_speed` or `reward_type`
    (default `"sparse"`). `draw_plan` adds planned trajectories to the picture.

    ```python
    >>> import gymnasium as gym
    >>> env = gym.make("mpd_gym:CarUMaze-v0", reward_type="dense", max_speed=3.0)
    ```

    Raises:
        InputError: If a constant is out of range, or the render mode is unknown.

    ## Version History
    * v0: first version.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": _FPS}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, **constants: Any) -> None:
        self.parameters = CarUMazeParameters(**constants)
        self.observation_space, self.action_space = _spaces(self.parameters)
        self.render_mode = render_mode
        size, centre, scale = view(self.parameters)
        self._renderer = Renderer(
            render_mode, size=size, centre=centre, scale=scale, fps=_FPS, title="CarUMaze"
        )
        self._scene: Scene | None = None

    @property
    def state(self) -> Array:
        """Current state ``[5]``, as in the observation.

        Raises:
            ResetNeeded: Before the first reset.
        """
        return np.array(self._require_scene().state)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Start an episode; see "Starting State" for the options.

        Raises:
            InputError: If an option is unknown, of the wrong shape, not finite, out of the speed's
                or steering angle's bounds, or in a wall.
        """
        exact = _exact_start(options, self.parameters)
        super().reset(seed=seed)
        row = _starts([self.np_random], exact, self.parameters)[0].tolist()
        self._scene = Scene(state=row[:5], goal=row[5:], trail=[row[:2]])
        observation, _, _, _, info = self._outcome(self._scene)
        return observation, info

    def step(self, action: Any) -> tuple[dict[str, Array], float, bool, bool, dict[str, Any]]:
        """Drive for one step.

        Raises:
            InputError: If `action` has the wrong shape or a non-finite value.
            ResetNeeded: Before the first reset.
        """
        scene = self._require_scene()
        controls = checked_array("action", action, (2,)).tolist()
        states = drive(scene.state, controls, self.parameters, functions=math)
        scene.state = states[-1]
        scene.collision = any(touches_wall(state, self.parameters, math) for state in states)
        scene.time += self.parameters.dt
        if self.render_mode is not None:
            scene.trail += [state[:2] for state in states]
        return self._outcome(scene)

    def compute_reward(self, achieved_goal: Array, desired_goal: Array, info: Any) -> Any:
        """Return the rewards of achieved positions for desired ones.

        Args:
            achieved_goal: ``[…, 2]``, m.
            desired_goal: ``[…, 2]``, m.
            info: Not used.

        Returns:
            float64 ``[…]``.

        Raises:
            InputError: If the last axis of a goal does not have length 2.
        """
        achieved, desired = np.asarray(achieved_goal), np.asarray(desired_goal)
        for name, goal in (("achieved_goal", achieved), ("desired_goal", desired)):
            if goal.shape[-1:] != (2,):
                raise InputError(f"{name}: expected shape [..., 2], got {goal.shape}")
        offset = achieved - desired
        distance = goal_distance(offset[..., 0], offset[..., 1], np)
        return goal_reward(distance, self.parameters)

    def draw_plan(self, plans: Array | None, chosen: int = 0) -> None:
        """Add planned trajectories to the coming pictures, until the next call or reset.

        Args:
            plans: States ``[H, >= 2]``, or candidates ``[N, H, >= 2]``, beginning with x and y, m;
                None for no plan.
            chosen: Index of the candidate to draw thick; the others are thin.

        Raises:
            InputError: If `plans` has another shape, or there is no candidate `chosen`.
            ResetNeeded: Before the first reset.
        """
        scene = self._require_scene()
        scene.plans = checked_plans(plans, chosen, 2)

    def render(self) -> Any:
        """Draw the maze, the goal, the trail, the plans and the car.

        Returns:
            uint8 ``[height, width, 3]`` in the mode ``"rgb_array"``, else None.
        """
        scene = self._require_scene()
        return self._renderer.render(lambda canvas: paint(canvas, scene, self.parameters))

    def close(self) -> None:
        """Close the window, if there is one."""
        self._renderer.close()

    def _require_scene(self) -> Scene:
        if self._scene is None:
            raise ResetNeeded("call reset() first")
        return self._scene

    def _outcome(self, scene: Scene) -> tuple[dict[str, Array], float, bool, bool, dict[str, Any]]:
        """What `step` returns; draws the picture in the mode ``"human"``."""
        if self.render_mode == "human":
            self.render()
        (x, y), (goal_x, goal_y) = scene.state[:2], scene.goal
        distance = goal_distance(x - goal_x, y - goal_y, math)
        observation = {
            "observation": np.array(scene.state),
            "achieved_goal": np.array((x, y)),
            "desired_goal": np.array(scene.goal),
        }
        success = distance < self.parameters.success_radius
        info = {"is_success": success, "collision": scene.collision}
        return observation, goal_reward(distance, self.parameters), scene.collision, False, info


class CarUMazeVectorEnv(BatchedEnv):
    """Many copies of `CarUMazeEnv`, stepped in one NumPy call for each operation.

    Args:
        num_envs: Number of copies.
        max_episode_steps: Steps after which a copy is truncated.
        autoreset_mode: As in `BatchedEnv`.
        render_mode: Only None.
        constants: Attributes of `CarUMazeParameters`.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        num_envs: int,
        *,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **constants: Any,
    ) -> None:
        self.parameters = CarUMazeParameters(**constants)
        observation_space, action_space = _spaces(self.parameters)
        super().__init__(
            num_envs,
            observation_space=observation_space,
            action_space=action_space,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            render_mode=render_mode,
        )

    def _initial(
        self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]
    ) -> tuple[Array, Infos]:
        states = _starts(generators, _exact_start(options, self.parameters), self.parameters)
        x, y, _, _, _, goal_x, goal_y = components(states)
        success = goal_distance(x - goal_x, y - goal_y, np) < self.parameters.success_radius
        return states, {"is_success": success, "collision": np.zeros(len(states), np.bool_)}

    def _advance(self, states: Array, actions: Array) -> tuple[Array, Array, BoolArray, Infos]:
        *state, goal_x, goal_y = components(states)
        path = drive(state, components(actions), self.parameters)
        collision = np.logical_or.reduce([touches_wall(s, self.parameters, np) for s in path])
        x, y = path[-1][:2]
        distance = goal_distance(x - goal_x, y - goal_y, np)
        infos = {"is_success": distance < self.parameters.success_radius, "collision": collision}
        following = np.stack((*path[-1], goal_x, goal_y), axis=-1)
        return following, goal_reward(distance, self.parameters), collision.copy(), infos

    def _observe(self, states: Array) -> dict[str, Array]:
        return {
            "observation": states[:, :5].copy(),
            "achieved_goal": states[:, :2].copy(),
            "desired_goal": states[:, 5:].copy(),
        }


def _spaces(parameters: CarUMazeParameters) -> tuple[spaces.Dict, spaces.Box]:
    """Observation and action space of one copy."""
    p = parameters
    low = np.array([-np.inf, -np.inf, -np.inf, p.min_speed, -p.max_steering])
    high = np.array([np.inf, np.inf, np.inf, p.max_speed, p.max_steering])
    goal = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    limit = np.array([p.max_acceleration, p.max_steering_rate], dtype=np.float32)
    observation = spaces.Box(low, high, dtype=np.float64)
    return (
        spaces.Dict({"observation": observation, "achieved_goal": goal, "desired_goal": goal}),
        spaces.Box(-limit, limit, dtype=np.float32),
    )


def _exact_start(
    options: Mapping[str, Any] | None, parameters: CarUMazeParameters
) -> dict[str, Array]:
    """Check the options of `reset`: state ``[5]`` and goal ``[2]``, both optional."""
    options = checked_options(options, {"state", "goal"})
    exact = {
        key: checked_array(f"options['{key}']", options[key], (size,))
        for key, size in (("state", 5), ("goal", 2))
        if key in options
    }
    p = parameters
    if "state" in exact:
        speed, steering = exact["state"][3:]
        if not (p.min_speed <= speed <= p.max_speed and abs(steering) <= p.max_steering):
            raise InputError(
                f"options['state']: expected a speed in [{p.min_speed}, {p.max_speed}] and a "
                f"steering angle in ±{p.max_steering}, got {speed} and {steering}"
            )
        if collides(exact["state"], p):
            raise InputError(f"options['state']: the car touches a wall at {exact['state'][:3]}")
    if "goal" in exact and not _in_corridor(exact["goal"], p):
        raise InputError(f"options['goal']: expected a point in a corridor, got {exact['goal']}")
    return exact


def _in_corridor(point: Array, parameters: CarUMazeParameters) -> bool:
    def within(box: tuple[float, float, float, float]) -> bool:
        left, bottom, right, top = box
        return bool(left <= point[0] <= right and bottom <= point[1] <= top)

    return within(parameters.outer) and not within(parameters.inner)


def _starts(
    generators: Sequence[np.random.Generator],
    exact: Mapping[str, Array],
    parameters: CarUMazeParameters,
) -> Array:
    """States and goals of M copies, ``[M, 7]``: drawn, or exact where given."""
    uniforms = np.empty((len(generators), _DRAWS))
    for row, generator in zip(uniforms, generators, strict=True):
        generator.random(out=row)
    upper = None
    if exact:
        in_upper = exact["state"][1] >= 0 if "state" in exact else exact["goal"][1] < 0
        upper = np.full(len(generators), in_upper)
    states, goals = draw_starts(uniforms, parameters, upper)
    states[:] = exact.get("state", states)
    goals[:] = exact.get("goal", goals)
    return np.concatenate([states, goals], axis=1)
