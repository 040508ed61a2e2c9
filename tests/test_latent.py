"""Encoders in use: training, files, encoded data, environments, and agents that see frames."""

from __future__ import annotations

import functools
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import TINY, play

from mpd_gym.agents import AGENTS, StateLimit, agent_class, load_agent
from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.boundary import check_spaces
from mpd_gym.datasets import EpisodeSource, load_episodes
from mpd_gym.envs.image_pendulum import make_image_pendulum
from mpd_gym.errors import CheckpointError, ConfigError, DataError, InputError
from mpd_gym.latent import (
    EncoderConfig,
    ImageEncoder,
    LatentObservation,
    encode_episodes,
    fit_autoencoder,
)
from mpd_gym.latent.data import encoded_rows, encoder_of
from mpd_gym.latent.env import make_latent_pendulum
from mpd_gym.latent.frames import FramePairs
from mpd_gym.latent.training import encoder_preset
from mpd_gym.models.autoencoder import Autoencoder, AutoencoderConfig
from mpd_gym.models.device import computes_bf16
from mpd_gym.training import TrainingConfig

SMALL = EncoderConfig(
    latent_dim=6,
    channels=(4, 4, 4, 4),
    dynamics_hidden=(8,),
    training=TrainingConfig(
        steps=8, batch_size=4, learning_rate=1e-3, validation_batches=1, ema_every=2
    ),
    validation_fraction=0.25,
)

SHARED = {"horizon", "unet", "diffusion_steps", "training", "regressor_training", "sampling"}


@functools.cache
def frames() -> EpisodeSource:
    """Four short episodes of the image pendulum."""
    env = gym.make("ImagePendulum-v0")
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    return load_episodes(play("ImagePendulum-v0", episodes=4, steps=20), metadata=spaces)


def encoder(seed: int = 0) -> ImageEncoder:
    """An encoder with random weights."""
    torch.manual_seed(seed)
    return ImageEncoder(Autoencoder(AutoencoderConfig(4, 64, 6, 1, (4, 4, 4, 4), (8,))))


@functools.cache
def agent() -> MPDiffuserAgent:
    return MPDiffuserAgent.fit(encode_episodes(frames(), encoder()), TINY, progress=False)


# --- training --------------------------------------------------------------------------------


def test_pairs_are_the_stacks_before_and_after_a_step() -> None:
    source, pairs = frames(), FramePairs(frames())
    assert len(pairs) == source.lengths.sum() == 80
    batch = pairs.sample(64, np.random.default_rng(0))
    assert batch.frames.shape == (64, 5, 64, 64) and batch.frames.dtype == np.uint8
    steps = {}
    for episode in source:
        observations = np.asarray(episode.observations)
        for t, action in enumerate(episode.actions):
            steps[action.astype(np.float32).tobytes()] = observations[t], observations[t + 1]
    for stack, action in zip(batch.frames, batch.actions, strict=True):
        before, after = steps[action.tobytes()]
        assert np.array_equal(stack[:4], before) and np.array_equal(stack[1:], after)
    again = pairs.sample(64, np.random.default_rng(0))
    assert np.array_equal(again.frames, batch.frames)
    assert np.array_equal(again.actions, batch.actions)


def test_observations_that_are_no_stacks_are_refused() -> None:
    episode = frames().episode(0)
    metadata = frames().metadata
    shuffled = np.asarray(episode.observations)[:, ::-1]
    with pytest.raises(DataError, match="the newest last"):
        FramePairs(load_episodes([replace(episode, observations=shuffled)], metadata=metadata))
    with pytest.raises(DataError, match="stacked square frames"):
        FramePairs(load_episodes(play("LQR-v0", episodes=1, steps=3)))


def test_training_continues_with_the_same_bits(tmp_path: Path) -> None:
    def train(steps: int, folder: str) -> ImageEncoder:
        config = replace(SMALL, training=replace(SMALL.training, steps=steps))
        return fit_autoencoder(frames(), config, directory=tmp_path / folder, progress=False)

    whole = train(4, "whole")
    half = train(2, "halves")
    resumed = train(4, "halves")
    assert resumed.digest == whole.digest != half.digest
    assert whole.history["steps"] == 4
    assert set(whole.history["held_out"]) == {"reconstruction", "dynamics"}
    with pytest.raises(ConfigError, match="identity"):
        config = replace(SMALL, dynamics_weight=2.0)
        fit_autoencoder(frames(), config, directory=tmp_path / "whole", progress=False)
    with pytest.raises(ConfigError, match="identity"):
        anew = [replace(episode, rewards=episode.rewards - 1) for episode in frames()]
        fit_autoencoder(
            load_episodes(anew, metadata=frames().metadata),
            replace(SMALL, training=replace(SMALL.training, steps=4)),
            directory=tmp_path / "whole",
            progress=False,
        )


def test_training_learns_and_leaves_the_global_random_state_alone() -> None:
    config = replace(SMALL, training=replace(SMALL.training, steps=60, learning_rate=3e-3))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trained = fit_autoencoder(frames(), config, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    first = fit_autoencoder(
        frames(), replace(config, training=replace(config.training, steps=2)), progress=False
    )
    held_out = trained.history["held_out"], first.history["held_out"]
    assert held_out[0]["reconstruction"] < 0.9 * held_out[1]["reconstruction"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dynamics_weight": -1.0}, "dynamics_weight"),
        ({"dynamics_weight": float("nan")}, "dynamics_weight"),
        ({"validation_fraction": 0.0}, "validation_fraction"),
        ({"latent_dim": 0}, "latent_dim"),
    ],
)
def test_wrong_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)


def test_the_presets_precision_is_what_the_cpu_computes_in() -> None:
    assert encoder_preset().training.precision == ("bf16" if computes_bf16() else "fp32")
    config = encoder_preset(steps=50, seed=3, precision="fp32")
    assert (config.seed, config.training.seed, config.training.steps) == (3, 3, 50)
    with pytest.raises(ConfigError, match="precision"):
        encoder_preset(precision="fp8")


def test_an_agent_with_another_model_beside_its_own_keeps_the_encoder() -> None:
    known, latents = agent(), encode_episodes(frames(), encoder())
    other = known.with_inverse_dynamics(latents, progress=False)
    assert other.encoder is known.encoder is not None


# --- the encoder and its file ----------------------------------------------------------------


def test_one_stack_encodes_as_in_a_batch_and_bytes_as_numbers() -> None:
    images = np.asarray(frames().episode(0).observations)
    many = encoder().encode(images)
    assert many.shape == (21, 6) and many.dtype == np.float32
    for image, latent in zip(images, many, strict=True):
        one = encoder().encode(image)
        assert one.shape == (6,)
        np.testing.assert_allclose(one, latent, atol=1e-5)
        assert one in encoder().latent_space
    np.testing.assert_allclose(encoder().encode(images.astype(float)), many, atol=1e-6)


def test_more_stacks_than_are_encoded_at_once() -> None:
    images = np.concatenate([np.asarray(episode.observations) for episode in frames()] * 4)
    assert len(images) > 256
    latents = encoder().encode(images)
    np.testing.assert_allclose(latents[-84:], latents[:84], atol=1e-5)
    assert encoder().encode(images[:0]).shape == (0, 6)


@pytest.mark.parametrize(
    "images",
    [np.zeros((3, 64, 64)), np.zeros((1, 1, 4, 64, 64)), np.full((4, 64, 64), 256.0),
     np.full((4, 64, 64), np.nan), np.full((4, 64, 64), -1)],
)  # fmt: skip
def test_other_images_are_refused(images: np.ndarray) -> None:
    with pytest.raises(InputError, match="images"):
        encoder().encode(images)


def test_decoded_latents_are_pictures() -> None:
    latents = encoder().encode(np.asarray(frames().episode(0).observations))
    pictures = encoder().decode(latents.reshape(3, 7, 6))
    assert pictures.shape == (3, 7, 4, 64, 64) and pictures.dtype == np.uint8
    with pytest.raises(InputError, match="latents"):
        encoder().decode(np.full(6, np.nan))


def test_files_give_back_every_bit(tmp_path: Path) -> None:
    first, path = encoder(), tmp_path / "encoder.safetensors"
    first.history["note"] = "kept"
    first.save(path)
    second = ImageEncoder.load(path)
    images = np.asarray(frames().episode(0).observations)
    assert np.array_equal(first.encode(images), second.encode(images))
    assert second.digest == first.digest != encoder(seed=1).digest
    assert second.history == first.history
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="digest"):
        ImageEncoder.load(path)
    with pytest.raises(CheckpointError, match="no such encoder"):
        ImageEncoder.load(tmp_path / "missing.safetensors")


def test_agents_are_no_encoders(tmp_path: Path) -> None:
    agent().save(tmp_path / "agent.safetensors")
    with pytest.raises(CheckpointError, match="kind"):
        ImageEncoder.load(tmp_path / "agent.safetensors")


# --- encoded data ----------------------------------------------------------------------------


def test_encoded_episodes_equal_encoding_each_observation() -> None:
    source, latents = frames(), encode_episodes(frames(), encoder())
    assert len(latents) == len(source)
    assert latents.metadata["observation_space"] == encoder().latent_space
    assert latents.metadata["action_space"] == source.metadata["action_space"]
    assert encoder().digest in latents.name
    assert "env_id" not in latents.metadata
    for before, after in zip(source, latents, strict=True):
        for observation, latent in zip(before.observations, after.observations, strict=True):
            np.testing.assert_allclose(latent, encoder().encode(observation), atol=1e-5)
        for part in ("actions", "rewards", "terminations", "truncations"):
            assert np.array_equal(getattr(before, part), getattr(after, part))


def test_the_cache_is_used_and_belongs_to_one_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latents.safetensors"
    first = encode_episodes(frames(), encoder(), cache=path)
    other = encode_episodes(frames(), encoder(seed=1), cache=path)  # writes it anew
    monkeypatch.setattr(ImageEncoder, "encode", None)
    again = encode_episodes(frames(), encoder(seed=1), cache=path)
    for index in range(4):
        assert np.array_equal(again[index].observations, other[index].observations)
        assert not np.array_equal(again[index].observations, first[index].observations)


def test_data_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match="encoder"):
        encode_episodes(load_episodes(play("LQR-v0", episodes=1, steps=3)), encoder())


def test_a_data_set_of_latents_names_the_encoder_that_ships() -> None:
    episodes, metadata = encoded_rows(frames(), "ImagePendulum-v0")
    shipped = ImageEncoder.load("ImagePendulum-v0")
    spaces = {"observation_space": shipped.latent_space}
    spaces["action_space"] = frames().metadata["action_space"]
    source = load_episodes(list(episodes), metadata={**spaces, **metadata})
    latents = encode_episodes(frames(), shipped)
    assert np.array_equal(source[0].observations, latents[0].observations)
    found = encoder_of([source, latents])
    assert found is not None and found.digest == shipped.digest
    for wrong in ({"id": "ImagePendulum-v0", "digest": "0"}, {"id": "x.safetensors"}, "x", 3):
        other = load_episodes(list(latents), metadata={**spaces, "encoder": wrong})
        with pytest.raises(ConfigError, match="collect it again"):
            encoder_of([other])


# --- environments ----------------------------------------------------------------------------


@pytest.fixture
def encoder_file(tmp_path: Path) -> str:
    path = tmp_path / "encoder.safetensors"
    encoder().save(path)
    return str(path)


def test_the_wrapper_shows_the_latents_of_what_the_environment_shows(encoder_file: str) -> None:
    env = LatentObservation(make_image_pendulum(), encoder_file)
    plain = make_image_pendulum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tests of registered environments look at them
        check_env(env, skip_render_check=True)
    images, info = plain.reset(seed=3)
    latent, latent_info = env.reset(seed=3)
    threads = torch.get_num_threads()
    for _ in range(5):
        assert (
            np.array_equal(latent, env.encoder.encode(images)) and latent in env.observation_space
        )
        assert np.array_equal(info["state"], latent_info["state"])
        images, *rest, info = plain.step(np.array([1.0]))
        latent, *latent_rest, latent_info = env.step(np.array([1.0]))
        assert rest == latent_rest
    assert torch.get_num_threads() == threads


@pytest.mark.fault("Spaces", "the latent wrapper around another environment", "refused")
def test_the_wrapper_refuses_other_environments(encoder_file: str) -> None:
    with pytest.raises(InputError, match="the encoder takes"):
        LatentObservation(gym.make("Pendulum-v1"), encoder_file)


def test_the_latent_pendulum_takes_another_encoder(encoder_file: str) -> None:
    env = make_latent_pendulum(encoder=encoder_file, g=5.0)
    assert env.observation_space.shape == (6,)
    assert env.unwrapped.parameters.g == 5.0
    with pytest.raises(CheckpointError, match="no such encoder"):
        make_latent_pendulum(encoder="nowhere.safetensors")


# --- agents ----------------------------------------------------------------------------------


def test_agents_take_frames_and_latents_alike() -> None:
    images = np.asarray(frames().episode(0).observations)
    for observation in (images[5], images[:7]):
        latents = encoder().encode(observation)
        seen, state = agent().predict(observation, deterministic=True)
        told, told_state = agent().predict(latents, deterministic=True)
        assert np.array_equal(seen, told)
        assert np.array_equal(state.plan, told_state.plan)
    plans = (agent().plan(x, deterministic=True) for x in (images[5], encoder().encode(images[5])))
    assert np.array_equal(*(plan.observations for plan in plans))


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_every_agent_plans_in_the_latent_space(name: str, tmp_path: Path) -> None:
    kind = agent_class(name)
    shared = {field.name for field in fields(kind.config_type)} & SHARED
    values: dict[str, Any] = {part: getattr(TINY, part) for part in shared}
    if name == "safediffuser":
        values["limits"] = (StateLimit(0, high=1.0),)
    config = kind.config_type(conditions=("return",), **values)
    made = kind.fit(encode_episodes(frames(), encoder()), config, progress=False)
    made.save(tmp_path / "agent.safetensors")
    images = np.asarray(frames().episode(0).observations)[:3]
    seen, _ = made.predict(images, deterministic=True)
    loaded = load_agent(tmp_path / "agent.safetensors", "cpu")
    told, _ = loaded.predict(encoder().encode(images), deterministic=True)
    assert seen.shape == (3, 1) and np.array_equal(seen, told)
    check_spaces(loaded, gym.make("ImagePendulum-v0"), name)
    with pytest.raises(ConfigError, match="observation space"):
        check_spaces(loaded, gym.make("Pendulum-v1"), name)


def test_the_encoder_travels_in_the_agents_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    agent().save(path)
    loaded = MPDiffuserAgent.load(path)
    assert loaded.encoder is not None and loaded.encoder.digest == encoder().digest
    image = np.asarray(frames().episode(1).observations)[3]
    expected, _ = agent().predict(image, deterministic=True)
    assert np.array_equal(loaded.predict(image, deterministic=True)[0], expected)
    changed = loaded.with_options(num_candidates=2)
    assert changed.encoder is loaded.encoder


@pytest.mark.fault(
    "Observations and actions", "frames of another size for an agent of pictures", "refused"
)
def test_agents_refuse_wrong_frames_and_encoders() -> None:
    with pytest.raises(InputError, match="images"):
        agent().predict(np.zeros((3, 64, 64), np.uint8))
    with pytest.raises(InputError, match="expected shape"):
        agent().predict(np.zeros((0, 4, 64, 64), np.uint8))
    torch.manual_seed(0)
    wider = ImageEncoder(Autoencoder(AutoencoderConfig(4, 64, 7, 1, (4, 4, 4, 4), (8,))))
    with pytest.raises(ConfigError, match="latents have shape"):
        agent().set_encoder(wider)


def test_data_of_two_encoders_is_refused() -> None:
    mixed = [encode_episodes(frames(), encoder(seed)) for seed in (0, 1)]
    with pytest.raises(ConfigError, match="different encoders"):
        MPDiffuserAgent.fit(mixed, TINY, progress=False)
