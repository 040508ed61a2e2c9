"""Recorded frames as episodes of latents, so that every agent plans in the latent space."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mpd_gym.atomic import user_path
from mpd_gym.checkpoint import load_file, save_file
from mpd_gym.datasets import EpisodeSource, load_episodes
from mpd_gym.datasets.source import MemorySource
from mpd_gym.errors import CheckpointError, ConfigError, InputError
from mpd_gym.latent.encoder import SHIPPED, ImageEncoder
from mpd_gym.types import Array, Episode

__all__ = ["encode_episodes", "encoded_rows", "encoder_of"]

_KEY = "encoder"  # metadata of encoded episodes: the encoder, or its id and digest
_KIND = "latents"
# Metadata about frames that do not hold for latents.
_OF_IMAGES = ("env_id", "env_kwargs", "env_entry_point", "env_wrappers", "frame_stack")


def encode_episodes(
    dataset: Any,
    encoder: ImageEncoder,
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> EpisodeSource:
    """Turn recorded frames into episodes whose observations are latents.

    Every observation is encoded once; the latents stay in memory, and in the cache file if given.
    An agent that learns from the result keeps the encoder, so its `predict` also takes frames.

    Args:
        dataset: Minari id or data set, episodes, or an `EpisodeSource`, with the encoder's
            observations.
        encoder: Its latents become the observations, float32 ``[T + 1, latent_dim]``.
        cache: Path of a ``.safetensors`` file for the latents. It is written if it is missing, or
            belongs to other episodes or another encoder.
        progress: Show a progress bar.

    Returns:
        The same episodes, named after the data and the encoder.

    Raises:
        DataError: If the data is damaged.
        InputError: If the observations do not fit the encoder.
        CheckpointError: If the cache is damaged.
    """
    source = dataset if isinstance(dataset, EpisodeSource) else load_episodes(dataset)
    if source.metadata["observation_space"].shape != encoder.image_space.shape:
        raise InputError(
            f"encoder: it takes observations of {encoder.image_space.shape}, {source.name} has "
            f"{source.metadata['observation_space'].shape}"
        )
    name = f"{source.name} (latents of encoder {encoder.digest})"
    known = None if cache is None else _cached(user_path(cache), name, source)
    episodes, bounds = [], np.cumsum([0, *(source.lengths + 1)])
    for index in tqdm(range(len(source)), "encoding", unit="episode", disable=not progress):
        episode = source.episode(index)
        episodes.append(
            _encoded(episode, encoder)
            if known is None
            else replace(episode, observations=known[bounds[index] : bounds[index + 1]])
        )
    if cache is not None and known is None:
        _store(user_path(cache), name, source, episodes)
    metadata = {key: value for key, value in source.metadata.items() if key not in _OF_IMAGES}
    metadata |= {"observation_space": encoder.latent_space, _KEY: encoder}
    return MemorySource(episodes, metadata, name=name)


def encoded_rows(dataset: Any, env_id: str) -> tuple[Iterator[Episode], dict[str, Any]]:
    """Prepare a data set of latents from a shipped encoder.

    Args:
        dataset: Stacked frames, as for `encode_episodes`.
        env_id: Environment whose encoder ships with the package.

    Returns:
        The episodes with latents, encoded on demand; and metadata for the new data set, with which
        agents that learn from it keep the encoder.

    Raises:
        DataError: If the data is damaged.
        CheckpointError: If no encoder ships for the environment.
    """
    source = dataset if isinstance(dataset, EpisodeSource) else load_episodes(dataset)
    encoder = ImageEncoder.load(env_id)
    metadata = {_KEY: {"id": env_id, "digest": encoder.digest}}
    return (_encoded(episode, encoder) for episode in source), metadata


def encoder_of(sources: Iterable[EpisodeSource]) -> ImageEncoder | None:
    """Return the encoder of the data sets' observations; None if they are not latents.

    Raises:
        ConfigError: If the encoders differ, or an encoder no longer ships.
    """
    found = [_encoder(source) for source in sources]
    digests = {None if encoder is None else encoder.digest for encoder in found}
    if len(digests) > 1:
        raise ConfigError(
            "dataset: expected observations of one kind, got latents of different encoders, or "
            "latents mixed with others; encode all data with the same encoder"
        )
    return found[0] if found else None


def _encoded(episode: Episode, encoder: ImageEncoder) -> Episode:
    return replace(episode, observations=encoder.encode(np.asarray(episode.observations)))


def _encoder(source: EpisodeSource) -> ImageEncoder | None:
    """Return the encoder of one data set; a file can only name a shipped one."""
    found = source.metadata.get(_KEY)
    if found is None or isinstance(found, ImageEncoder):
        return found
    known = isinstance(found, Mapping) and found.get("id") in SHIPPED
    encoder = ImageEncoder.load(found["id"]) if known else None
    if encoder is None or encoder.digest != found.get("digest"):
        raise ConfigError(
            f"dataset: {source.name} holds latents of the encoder {found!r}, which does not ship "
            "with this version; collect it again with --overwrite"
        )
    return encoder


def _cached(path: Path, name: str, source: EpisodeSource) -> Array | None:
    """Read latents ``[steps + episodes, latent_dim]`` from a cache of this encoder and data."""
    if not path.exists():
        return None
    tensors, header = load_file(path, kind=_KIND)
    try:
        latents, lengths = (tensors[key].numpy() for key in ("latents", "lengths"))
        same = header["name"] == name and np.array_equal(lengths, source.lengths)
        same = same and header.get("data") == source.digest  # those of earlier versions lack it
    except KeyError as error:
        raise CheckpointError(f"{path}: holds no {error}; remove it") from error
    return latents if same else None


def _store(path: Path, name: str, source: EpisodeSource, episodes: list[Episode]) -> None:
    latents = np.concatenate([np.asarray(episode.observations) for episode in episodes])
    tensors = {"latents": latents, "lengths": source.lengths}
    save_file(path, tensors, {"name": name, "data": source.digest}, kind=_KIND)
