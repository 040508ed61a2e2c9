"""The image encoder of environments, data sets and agents, and its file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from gymnasium import spaces

from mpd_gym.atomic import user_path
from mpd_gym.checkpoint import load_file, load_into, save_file
from mpd_gym.errors import MALFORMED, CheckpointError, InputError, from_mapping
from mpd_gym.models.autoencoder import Autoencoder, AutoencoderConfig
from mpd_gym.types import Array

__all__ = ["SHIPPED", "ImageEncoder", "encoder_path"]

SHIPPED = {"ImagePendulum-v0": "image-pendulum-encoder.safetensors"}
"""Environments whose encoder ships with the package, and its file."""

_KIND = "encoder"
_ROWS = 256  # stacks that are encoded at once


@final
class ImageEncoder:
    """Turns stacks of frames into latents, and latents back into frames to look at.

    Make one with `fit_autoencoder` or `load`.

    Args:
        model: A trained autoencoder; kept, in evaluation mode.
        history: Data and settings of its training, JSON values.

    Attributes:
        image_space: Space of the stacks, uint8 ``[frames, size, size]``.
        latent_space: Space of the latents, float32 ``[latent_dim]``.
    """

    def __init__(self, model: Autoencoder, history: Mapping[str, Any] | None = None) -> None:
        # batches take 0.6 times the time with weights in this order
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model.eval().requires_grad_(False)
        self.history = dict(history or {})
        config = model.config
        shape, bound = (config.frames, config.size, config.size), config.latent_bound
        self.image_space = spaces.Box(0, 255, shape, np.uint8)
        self.latent_space = spaces.Box(-bound, bound, (config.latent_dim,), np.float32)

    def encode(self, images: Array) -> Array:
        """Encode one stack or many.

        Args:
            images: ``[frames, size, size]`` or ``[M, frames, size, size]``, 0 … 255, the newest
                frame last.

        Returns:
            float32 ``[latent_dim]`` or ``[M, latent_dim]``, of mean 0 and mean square 1.

        Raises:
            InputError: If the shape is wrong or a value is outside 0 … 255.
        """
        images = np.asarray(images)
        shape = self.image_space.shape
        if images.shape[-3:] != shape or images.ndim not in (3, 4):
            raise InputError(f"images: expected shape {shape} or (n, *{shape}); got {images.shape}")
        if images.dtype != np.uint8 and not ((images >= 0) & (images <= 255)).all():
            raise InputError("images: expected values from 0 to 255, got values outside")
        rows = images.reshape(-1, *shape)
        parts = [self._encoded(rows[i : i + _ROWS]) for i in range(0, len(rows), _ROWS)]
        size = self.model.config.latent_dim
        latents = np.concatenate(parts) if parts else np.empty((0, size), np.float32)
        return latents if images.ndim == 4 else latents[0]

    def decode(self, latents: Array) -> Array:
        """Decode latents ``[..., latent_dim]`` into stacks, uint8 ``[..., F, H, W]``.

        Raises:
            InputError: If the last axis has the wrong size or a value is not finite.
        """
        rows = np.asarray(latents, np.float32)
        size = self.model.config.latent_dim
        if rows.shape[-1:] != (size,) or not np.isfinite(rows).all():
            raise InputError(f"latents: expected finite numbers [..., {size}]; got {rows.shape}")
        flat = torch.tensor(rows.reshape(-1, size), device=self._device)
        with torch.inference_mode():
            shares = self.model.decode(flat).clamp(0, 1)
        frames: Array = (255 * shares).round().to(torch.uint8).cpu().numpy()
        return frames.reshape(*rows.shape[:-1], *frames.shape[1:])

    def _encoded(self, rows: Array) -> Array:
        values = np.ascontiguousarray(rows, None if rows.dtype == np.uint8 else np.float32)
        if not values.flags.writeable:
            values = values.copy()  # torch has no read-only tensors
        with torch.inference_mode():
            latents = self.model.encode(torch.from_numpy(values).to(self._device))
        return np.asarray(latents.cpu())

    @property
    def _device(self) -> torch.device:
        return self.model.action_std.device

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify configuration and weights."""
        digest = hashlib.sha256(repr(self.model.config).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encoder to one ``.safetensors`` file, whole or not at all.

        Raises:
            InputError: If the path does not end in ``.safetensors``.
            CheckpointError: If the disk refuses; an existing file stays as it is.
        """
        save_file(path, self.model.state_dict(), self.header(), kind=_KIND)

    def header(self) -> dict[str, Any]:
        """Return configuration and history for a file."""
        return {"config": asdict(self.model.config), "history": self.history}

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> ImageEncoder:
        """Read an encoder.

        Args:
            source: Path of a file that `save` wrote, or the id of an environment whose encoder
                ships with the package, such as ``"ImagePendulum-v0"``.

        Raises:
            CheckpointError: If it is missing, damaged, of another kind, or does not match its
                configuration.
        """
        path = encoder_path(source)
        tensors, header = load_file(path, kind=_KIND)
        return cls.restored(header, tensors, "", str(path))

    @classmethod
    def restored(
        cls, header: Mapping[str, Any], tensors: Mapping[str, Any], prefix: str, source: str
    ) -> ImageEncoder:
        """Build an encoder from the content of a file.

        Args:
            header: Result of `header`.
            tensors: All tensors of the file.
            prefix: Opens the names of the encoder's tensors.
            source: The file, for messages.

        Raises:
            CheckpointError: If header and tensors do not match.
        """
        try:
            config = from_mapping(AutoencoderConfig, header["config"])
            history = dict(header["history"])
            with torch.device("meta"):  # sizes are compared before memory is taken
                load_into(Autoencoder(config), tensors, prefix, source=source)
        except (RuntimeError, *MALFORMED) as error:
            raise CheckpointError(
                f"{source}: its encoder's header does not fit ({error}); train again"
            ) from error
        with torch.random.fork_rng(devices=[]):  # the constructor draws weights
            model = Autoencoder(config)
        load_into(model, tensors, prefix, source=source)
        return cls(model, history)


def encoder_path(source: str | os.PathLike[str]) -> Path:
    """Return the path of an encoder's file.

    Args:
        source: A path, or the id of an environment whose encoder ships with the package.

    Raises:
        CheckpointError: If neither exists.
    """
    path = user_path(source)
    if not path.exists() and str(source) in SHIPPED:
        path = Path(str(resources.files("mpd_gym"))) / "pretrained" / SHIPPED[str(source)]
    if path.exists():
        return path
    raise CheckpointError(
        f"{source}: no such encoder; give the path of a file that ImageEncoder.save wrote, or one "
        f"of {sorted(SHIPPED)}"
    )
