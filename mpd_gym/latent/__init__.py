"""Planning in the latent space of stacked frames (MPDiffuser, section 4.3).

`fit_autoencoder` trains an `ImageEncoder`. `encode_episodes` turns recorded frames into episodes of
latents, from which every agent of this package learns unchanged. `LatentObservation` shows latents
instead of frames. The environment here is registered by name only, so making it loads torch.
"""

from __future__ import annotations

from mpd_gym.latent.data import encode_episodes
from mpd_gym.latent.encoder import ImageEncoder
from mpd_gym.latent.env import LatentObservation
from mpd_gym.latent.training import EncoderConfig, fit_autoencoder

__all__ = [
    "EncoderConfig",
    "ImageEncoder",
    "LatentObservation",
    "encode_episodes",
    "fit_autoencoder",
]
