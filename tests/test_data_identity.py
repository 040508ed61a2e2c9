"""Data are told by their content, and a training goes on only as what it was."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, play, source

from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.checkpoint import load_file, save_file
from mpd_gym.collect.record import write_dataset
from mpd_gym.datasets import ConditionSpec, EpisodeSource, load_episodes
from mpd_gym.errors import ConfigError, DataError
from mpd_gym.latent import ImageEncoder, encode_episodes
from mpd_gym.types import Episode

TWELVE = play("LQR-v0", episodes=12)
SPACES = {
    key: source("LQR-v0", episodes=1).metadata[key] for key in ("observation_space", "action_space")
}
RETURN = ConditionSpec("return", horizon=12)
CONFIG = replace(
    TINY,
    conditions=(RETURN,),
    training=replace(TINY.training, steps=4, ema_every=2),
    regressor_training=replace(TINY.regressor_training, steps=4, ema_every=2),
)


def memory(episodes: list[Episode] = TWELVE[:6]) -> EpisodeSource:
    return load_episodes(episodes, metadata=SPACES)


def changed(part: str, change: Callable[[Any], Any], first: int = 1) -> list[Episode]:
    """The first six episodes, with an array changed in episodes `first` to 5."""
    return [
        replace(episode, **{part: change(getattr(episode, part))}) if index >= first else episode
        for index, episode in enumerate(TWELVE[:6])
    ]


def train(data: EpisodeSource, folder: Path | None, config: Any = CONFIG, **options: Any) -> Any:
    return MPDiffuserAgent.fit(data, config, directory=folder, progress=False, **options)


def same_weights(one: MPDiffuserAgent, other: MPDiffuserAgent) -> bool:
    return all(
        torch.equal(left, right)
        for role, model in one.models.items()
        for left, right in zip(
            model.state_dict().values(), other.models[role].state_dict().values(), strict=True
        )
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    train(memory(), folder)
    return folder


# --- trainings -----------------------------------------------------------------------------------

OTHERS = {
    "observations": memory(changed("observations", lambda rows: rows * 1.01)),
    "rewards": memory(changed("rewards", lambda rewards: rewards - 1)),
    "actions": memory(changed("actions", lambda actions: -actions)),
    "the last step": memory(
        [*TWELVE[:5], replace(TWELVE[5], rewards=TWELVE[5].rewards + np.eye(24)[23])]
    ),
    "the order": memory(TWELVE[5::-1]),
    "a type": memory(changed("rewards", lambda rewards: rewards.astype(np.float32))),
}


@pytest.mark.fault(
    "Training",
    "other episodes under the same data set's name in the folder of a training",
    "refused; resume=False trains on them",
)
@pytest.mark.parametrize("what", sorted(OTHERS))
def test_a_training_does_not_go_on_with_other_episodes(done: Path, what: str) -> None:
    with pytest.raises(ConfigError, match=r"identity\.data\[0\]\.digest is .*resume=False"):
        train(OTHERS[what], done)


@pytest.mark.fault("Training", "other episodes of the same data set", "refused")
def test_selections_of_the_same_first_episode_are_other_data(tmp_path: Path) -> None:
    data = memory(TWELVE)
    train(data.select([0, 1, 2, 3]), tmp_path)
    with pytest.raises(ConfigError, match=r"identity\.data\[0\]\.digest is"):
        train(data.select([0, 8, 9, 10]), tmp_path)
    anew = train(data.select([0, 8, 9, 10]), tmp_path, resume=False)
    assert same_weights(anew, train(data.select([0, 8, 9, 10]), None))


CHANGES = {
    "loss.prediction": replace(CONFIG, loss=replace(CONFIG.loss, prediction="x0")),
    "loss.condition_dropout": replace(CONFIG, loss=replace(CONFIG.loss, condition_dropout=0.5)),
    "diffusion_steps": replace(CONFIG, diffusion_steps=8),
    "horizon": replace(CONFIG, horizon=16),
    "schedule": replace(CONFIG, schedule="linear"),
    "normalizer": replace(CONFIG, normalizer="cdf"),
    "discount": replace(CONFIG, discount=0.9),
    "conditions[0].horizon": replace(CONFIG, conditions=(replace(RETURN, horizon=9),)),
    "conditions[0].terminal_penalty": replace(
        CONFIG, conditions=(replace(RETURN, terminal_penalty=-5.0),)
    ),
    "first_step_share": replace(CONFIG, first_step_share=0.5),
    "validation_fraction": replace(CONFIG, validation_fraction=0.5),
    "padding": replace(CONFIG, padding="zeros"),
    "null": replace(CONFIG, null="zeros"),
    "unet.width": replace(CONFIG, unet=replace(CONFIG.unet, width=16)),
    "seed": replace(CONFIG, seed=1),
}


@pytest.mark.fault(
    "Training",
    "a resumed training with another configuration of the agent, 15 fields",
    "refused; names the field and both values",
)
@pytest.mark.parametrize("field", sorted(CHANGES))
def test_a_training_does_not_go_on_with_a_changed_configuration(done: Path, field: str) -> None:
    where = rf"identity\.config\.{field}".replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ConfigError, match=rf"{where} is .*, but .* was trained with .*resume="):
        train(memory(), done, CHANGES[field])


@pytest.mark.fault(
    "Training",
    "a resumed training with more steps, another sampling, or one more model",
    "goes on, and ends as if it had been so from the start",
)
def test_what_shapes_no_weights_may_change(tmp_path: Path) -> None:
    train(memory(), tmp_path)
    longer = replace(
        CONFIG,
        training=replace(CONFIG.training, steps=8),
        sampling=replace(CONFIG.sampling, temperature=0.1),
        reward_model=True,
    )
    resumed = train(memory(), tmp_path, longer)
    assert same_weights(resumed, train(memory(), None, longer))
    assert resumed.history["planner"]["steps"] == 8


def test_other_data_of_the_dynamics_model_are_other_normalisers(tmp_path: Path) -> None:
    train(memory(), tmp_path, dynamics_dataset=memory(TWELVE[6:]))
    with pytest.raises(ConfigError, match=r"identity\.normalizers is"):
        train(memory(), tmp_path)


def test_functions_of_conditions_are_told_by_their_values(tmp_path: Path) -> None:
    config = replace(CONFIG, conditions=(ConditionSpec("custom", "speed", size=1),))
    run = partial(train, memory(), tmp_path, config)
    run(condition_functions={"speed": lambda episode: episode.actions[:, :1]})
    run(condition_functions={"speed": lambda episode: 1.0 * episode.actions[:, :1]})
    with pytest.raises(ConfigError, match=r"identity\.conditions is"):
        run(condition_functions={"speed": lambda episode: 2.0 * episode.actions[:, :1]})


def test_a_second_agent_is_not_given_what_the_first_learned(tmp_path: Path) -> None:
    agents = [train(memory(), None, replace(CONFIG, seed=seed)) for seed in (0, 1)]
    tune = {"dataset": memory(), "steps": 3, "directory": tmp_path, "progress": False}
    agents[0].finetune_dynamics(**tune)
    with pytest.raises(ConfigError, match=r"identity\.(config\.seed|initial_weights) is"):
        agents[1].finetune_dynamics(**tune)
    agents[0].finetune_dynamics(**tune, name="again")  # from other weights than the first time
    again = train(memory(), None, CONFIG)
    again.finetune_dynamics(**tune)  # the same from the same
    with pytest.raises(ConfigError, match=r"identity\.initial_weights is"):
        again.finetune_dynamics(**tune)


@pytest.mark.fault(
    "Training", "a checkpoint of a version that compared less", "refused; the message says so"
)
def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    train(memory(), tmp_path)
    path = tmp_path / "planner/checkpoint.safetensors"
    tensors, header = load_file(path)
    own = {key: header[key] for key in header if key not in ("format_version", "kind")}
    own.pop("package_version")
    data = {"name": "episodes in memory", "episodes": 6, "steps": 144, "first episode": "ab"}
    save_file(path, tensors, own | {"identity": {"data": [data]}}, kind="training")
    with pytest.raises(ConfigError, match=r"does not tell its identity.*earlier.*resume=False"):
        train(memory(), tmp_path)
    train(memory(), tmp_path, resume=False)


# --- digests -------------------------------------------------------------------------------------


def test_equal_content_has_one_digest_whatever_the_name_and_format(tmp_path: Path) -> None:
    digest = memory().digest
    write_dataset("tests/one-v0", TWELVE[:6], **SPACES)
    write_dataset("tests/other-v0", TWELVE, **SPACES)
    for same in (
        load_episodes("tests/one-v0"),
        load_episodes("tests/other-v0").select(range(6)),
        memory(TWELVE[5::-1]).select(range(5, -1, -1)),
        memory(TWELVE).where(lambda episode: any(episode.seed == one.seed for one in TWELVE[:6])),
        pickle.loads(pickle.dumps(memory())),
    ):
        assert same.digest == digest
        assert same.same_as(memory())
    assert len({data.digest for data in OTHERS.values()} | {digest}) == len(OTHERS) + 1
    assert memory(TWELVE[:3] + TWELVE[2:5]).digest != digest
    assert not memory(TWELVE[:5]).same_as(memory())


def test_clipping_and_spaces_are_part_of_the_digest() -> None:
    wide = changed("actions", lambda actions: np.clip(3 * actions, -2, 2), first=0)
    spaces = SPACES | {"action_space": type(SPACES["action_space"])(-2, 2, (1,))}
    narrow = SPACES | {"action_space": type(SPACES["action_space"])(-0.5, 0.5, (1,))}
    clipped = load_episodes(wide, metadata=narrow, clip_actions=True)
    kept = load_episodes(wide, metadata=spaces)
    other = load_episodes(
        wide, metadata=spaces | {"action_space": type(narrow["action_space"])(-3, 3, (1,))}
    )
    assert len({clipped.digest, kept.digest, other.digest}) == 3


def test_each_episode_is_read_once_for_the_digest(tmp_path: Path, monkeypatch: Any) -> None:
    write_dataset("tests/once-v0", TWELVE[:6], **SPACES)
    data = load_episodes("tests/once-v0")
    rows = []
    read = type(data)._read
    monkeypatch.setattr(type(data), "_read", lambda *given: rows.append(given[1]) or read(*given))
    first = data.select([0, 1, 2])
    assert (first.digest, first.digest) == (first.digest, data.select(range(3)).digest)
    assert rows == [0, 1, 2]
    list(data)
    before = len(rows)
    assert data.digest == memory().digest
    assert len(rows) == before  # what was read whole was hashed on the way


def test_data_of_one_name_are_all_used() -> None:
    agent = train(memory(), None, dynamics_dataset=memory(changed("actions", lambda u: 0.5 * u, 0)))
    whole = train(memory(), None, dynamics_dataset=memory())
    assert same_weights(whole, train(memory(), None))  # the same twice counts once
    scaled = [replace(episode, observations=3 * episode.observations) for episode in TWELVE[:6]]
    wide = train(memory(), None, dynamics_dataset=memory(scaled))
    ranges = [np.max(one.parts.normalizers.observation.unnormalize(np.ones(2)))
              for one in (agent, wide)]  # fmt: skip
    assert ranges[1] == pytest.approx(3 * ranges[0])


def test_cached_latents_are_of_the_same_pictures(tmp_path: Path) -> None:
    encoder = ImageEncoder.load("ImagePendulum-v0")
    space, cache = encoder.image_space, tmp_path / "latents.safetensors"
    spaces = {"observation_space": space, "action_space": SPACES["action_space"]}
    rng = np.random.default_rng(0)
    pictures = [
        [replace(one, observations=rng.integers(0, 255, (25, *space.shape), np.uint8))
         for one in TWELVE[:2]]
        for _ in range(2)
    ]  # fmt: skip
    pictures[1][0] = pictures[0][0]  # the first episode is the same
    data = [load_episodes(episodes, metadata=spaces) for episodes in pictures]
    first = encode_episodes(data[0], encoder, cache=cache)
    stored = cache.read_bytes()
    assert encode_episodes(data[0], encoder, cache=cache).digest == first.digest
    assert cache.read_bytes() == stored
    second = encode_episodes(data[1], encoder, cache=cache)
    assert second.digest == encode_episodes(data[1], encoder).digest != first.digest


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.fault(
    "Data", "lists and tensors in an episode in memory", "the data of the same arrays"
)
def test_lists_and_tensors_in_episodes_are_arrays() -> None:
    listed = [
        replace(e, observations=torch.as_tensor(e.observations), rewards=e.rewards.tolist())
        for e in TWELVE[:2]
    ]
    assert load_episodes(listed, metadata=SPACES).digest == memory(TWELVE[:2]).digest
    ragged = [TWELVE[0], replace(TWELVE[1], rewards=["a", "b"])]
    with pytest.raises(DataError, match=r"episode 1.*rewards: expected numbers"):
        load_episodes(ragged, metadata=SPACES)


@pytest.mark.fault(
    "Data", "episodes in memory that the caller goes on to change", "the data stay as they were"
)
def test_episodes_in_memory_are_copies() -> None:
    for mapped in (False, True):
        given: list[Any] = pickle.loads(pickle.dumps(TWELVE[:3]))
        if mapped:
            given = [replace(one, observations={"observation": one.observations}) for one in given]
        kept = pickle.dumps(given)
        data = load_episodes(given)
        for one in given:
            rows = one.observations["observation"] if mapped else one.observations
            for array in (rows, one.actions, one.rewards):
                array[:] = 7
            if mapped:
                one.observations.clear()
        assert data.digest == load_episodes(pickle.loads(kept)).digest
        assert float(np.max(data.episode(0).actions)) < 7


@pytest.mark.fault(
    "Data", "a caller who writes into an episode that was read", "refused, or the caller's own copy"
)
def test_an_episode_that_was_read_changes_no_data() -> None:
    write_dataset("tests/write-v0", TWELVE[:3], **SPACES)
    for data in (memory(TWELVE[:3]), memory().select([0, 1, 2]), load_episodes("tests/write-v0")):
        digest = data.digest
        for name in ("observations", "actions", "rewards", "terminations"):
            array = getattr(data.episode(1), name)
            if array.flags.writeable:
                array[:] = 0
            else:
                with pytest.raises(ValueError, match="read-only"):
                    array[:] = 0
        assert load_episodes(list(data), metadata=SPACES).digest == digest
        data.metadata["observation_space"] = None
        assert data.metadata["observation_space"] == SPACES["observation_space"]
