"""Environments; importing this package registers their ids with Gymnasium."""

from __future__ import annotations

from gymnasium import register

__all__: list[str] = []

register(
    id="CarUMaze-v0",
    entry_point="mpd_gym.envs.car_umaze:CarUMazeEnv",
    vector_entry_point="mpd_gym.envs.car_umaze:CarUMazeVectorEnv",
    max_episode_steps=64,
)

register(
    id="LQR-v0",
    entry_point="mpd_gym.envs.lqr:LQREnv",
    vector_entry_point="mpd_gym.envs.lqr:LQRVectorEnv",
    max_episode_steps=200,
)

register(
    id="ConstrainedPendulum-v0",
    entry_point="mpd_gym.envs.constrained_pendulum:make_constrained_pendulum",
    vector_entry_point="mpd_gym.envs.constrained_pendulum:ConstrainedPendulumVectorEnv",
    max_episode_steps=200,
)

register(
    id="ImagePendulum-v0",
    entry_point="mpd_gym.envs.image_pendulum:make_image_pendulum",
    max_episode_steps=200,
)

register(
    id="LatentPendulum-v0",
    entry_point="mpd_gym.latent.env:make_latent_pendulum",
    max_episode_steps=200,
)

register(
    id="Walker2dTorqueDefect-v0",
    entry_point="mpd_gym.envs.walker2d_torque_defect:make_walker2d_torque_defect",
    max_episode_steps=1000,
)
