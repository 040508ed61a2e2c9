"""The autoencoder: shapes, normalised latents, and what its two losses mean."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from mpd_gym.errors import ConfigError, InputError
from mpd_gym.models.autoencoder import Autoencoder, AutoencoderConfig, autoencoder_loss

SMALL = AutoencoderConfig(
    frames=3, size=16, latent_dim=6, action_dim=2, channels=(4, 8), dynamics_hidden=(16,)
)


def make(config: AutoencoderConfig = SMALL, seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(config)


def stacks(count: int, frames: int = 3, seed: int = 0) -> torch.Tensor:
    shape = (count, frames, 16, 16)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(values)


def actions(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [(4,), (4, 8), (4, 8, 8, 12)])
@pytest.mark.parametrize("size", [16, 32])
def test_shapes(channels: tuple[int, ...], size: int) -> None:
    model = make(AutoencoderConfig(2, size, 5, 1, channels, ()))
    frames = torch.zeros(7, 2, size, size, dtype=torch.uint8)
    latents = model.encode(frames)
    assert latents.shape == (7, 5)
    assert model.decode(latents).shape == frames.shape
    assert model.predict(latents, torch.zeros(7, 1)).shape == (7, 5)


def test_latents_have_mean_zero_and_mean_square_one_and_keep_their_bound() -> None:
    latents = make().encode(stacks(50)).detach()
    assert torch.allclose(latents.mean(1), torch.zeros(50), atol=1e-5)
    assert torch.allclose(latents.square().mean(1), torch.ones(50), atol=1e-2)
    assert latents.abs().max() < SMALL.latent_bound
    assert latents.std(0).max() > 1e-3  # they tell stacks apart


def test_floats_and_bytes_encode_alike() -> None:
    model, frames = make(), stacks(4)
    assert torch.equal(model.encode(frames), model.encode(frames.float()))


def test_every_frame_and_the_order_of_frames_matter() -> None:
    model, frames = make(), stacks(4)
    latents = model.encode(frames)
    assert not torch.allclose(model.encode(frames.flip(1)), latents, atol=1e-3)
    for number in range(3):
        changed = frames.clone()
        changed[:, number] = 255 - changed[:, number]
        assert not torch.allclose(model.encode(changed), latents, atol=1e-3)


def test_actions_are_scaled_by_the_statistics_of_the_data() -> None:
    model, latents, u = make(), torch.randn(5, 6), actions(5)
    plain = model.predict(latents, u)
    model.set_action_statistics(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0]))
    scale = torch.tensor([0.5, 1.0])  # a constant action keeps its unit
    assert torch.allclose(model.predict(latents, u * scale + torch.tensor([1.0, -2.0])), plain)
    with pytest.raises(InputError, match="finite"):
        model.set_action_statistics(torch.tensor([1.0, torch.nan]), torch.ones(2))


def test_losses_are_shares_of_what_was_to_be_explained() -> None:
    model, frames, u = make(), stacks(9, frames=4), actions(9)
    parts = autoencoder_loss(model, frames, u, 3.0)
    now = frames[:, :3].double().numpy() / 255
    latent, after = (model.encode(part).detach() for part in (frames[:, :3], frames[:, 1:]))
    decoded = model.decode(latent).detach().double().numpy()
    predicted = model.predict(latent, u).detach().numpy()
    reconstruction = ((decoded - now) ** 2).mean() / now.var(axis=0).mean()
    motion = (after - latent).numpy()
    dynamics = ((predicted - after.numpy()) ** 2).mean() / (motion**2).mean()
    assert parts["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-4)
    assert parts["dynamics"].item() == pytest.approx(dynamics, rel=1e-4)
    assert parts["loss"].item() == pytest.approx(reconstruction + 3 * dynamics, rel=1e-4)


def test_predicting_the_mean_or_no_motion_explains_nothing() -> None:
    model, frames = make(), stacks(9, frames=4)
    with torch.no_grad():
        for parameter in (*model.decoder.parameters(), *model.dynamics.parameters()):
            parameter.zero_()
        # every frame is one grey, so that the decoder's last bias can hold their mean
        frames = frames[:, :, :1, :1].expand(-1, -1, 16, 16).clone()
        model.decoder[-1].bias.copy_(frames[:, :3].float().mean((0, 2, 3)) / 255)
    parts = autoencoder_loss(model, frames, actions(9), 1.0)
    assert parts["reconstruction"].item() == pytest.approx(1.0, rel=1e-4)
    assert parts["dynamics"].item() == pytest.approx(1.0, rel=1e-4)


def test_a_still_picture_is_predicted_by_no_change() -> None:
    model, frames = make(), stacks(9, frames=1).expand(-1, 4, -1, -1)
    with torch.no_grad():
        for parameter in model.dynamics.parameters():
            parameter.zero_()
    assert autoencoder_loss(model, frames, actions(9), 1.0)["dynamics"].item() < 1e-8


def test_the_dynamics_loss_shapes_the_encoder_too() -> None:
    model = make()
    autoencoder_loss(model, stacks(9, frames=4), actions(9), 1.0)["dynamics"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.encoder.parameters())
    assert all(p.grad is None for p in model.decoder.parameters())


def test_constant_frames_give_finite_losses_and_gradients() -> None:
    model = make()
    frames = torch.zeros(4, 4, 16, 16, dtype=torch.uint8)
    loss = autoencoder_loss(model, frames, actions(4), 1.0)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_configurations_survive_json() -> None:
    assert AutoencoderConfig(**json.loads(json.dumps(asdict(SMALL)))) == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 18}, "multiple of 4"),
        ({"channels": ()}, "multiple of 1"),
        ({"channels": (4, 0)}, "channels"),
        ({"latent_dim": 1}, "latent_dim"),
        ({"frames": 0}, "frames"),
        ({"action_dim": 0}, "action_dim"),
        ({"dynamics_hidden": (0,)}, "dynamics_hidden"),
    ],
)
def test_wrong_sizes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoencoderConfig(**{**asdict(SMALL), **change})


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 3, 16, 8), (3, 16, 16)])
def test_stacks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="frames: expected shape"):
        make().encode(torch.zeros(shape))
