"""Recipe of the data set of latents; `mpd_gym.collect.recipes` lists it with all others."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import minari

from mpd_gym.collect.recipes import PENDULUM_RETURNS, RECIPES, Collection, info
from mpd_gym.collect.record import write_dataset
from mpd_gym.latent.data import encoded_rows

__all__ = ["collect_latent_pendulum"]

IMAGES = "mpd_gym/image-pendulum/replay-v0"


def collect_latent_pendulum(collection: Collection) -> Any:
    """Encode the frames of the image pendulum; collect these first if they are missing.

    Args:
        collection: Settings of the data set; `fraction` is the share of episodes to encode.
    """
    if IMAGES not in minari.list_local_datasets():
        RECIPES[IMAGES].load()(replace(collection, dataset_id=IMAGES, overwrite=False))
    episodes, metadata = encoded_rows(IMAGES, "ImagePendulum-v0")
    total = minari.load_dataset(IMAGES).total_episodes
    return write_dataset(
        collection.dataset_id,
        islice(episodes, collection.size(total)),
        env_id="LatentPendulum-v0",
        info=info(
            "SAC replay buffer", f"{IMAGES} as latents of the shipped encoder.", PENDULUM_RETURNS
        ),
        metadata=metadata,
        overwrite=collection.overwrite,
        progress=collection.progress,
    )
