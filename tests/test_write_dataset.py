"""Writing existing episodes as a data set, whole or not at all."""

from __future__ import annotations

import pickle
from typing import Any

import minari
import numpy as np
import pytest
from recorders import (
    ENV,
    ID,
    Interrupt,
    Marked,
    Noisy,
    an_episode,
    assert_same,
    quiet,
)

from mpd_gym.collect.record import (
    DatasetInfo,
    write_dataset,
)
from mpd_gym.collect.storage import Place
from mpd_gym.datasets.episodes import load_episodes
from mpd_gym.errors import ConfigError, DataError, InputError


def test_write_dataset() -> None:
    episodes = [an_episode(3), an_episode(7, seed=11)]
    write_dataset(ID, iter(episodes), env_id=ENV, info=DatasetInfo(author="me"))
    source = load_episodes(ID)
    assert_same(source, episodes)
    assert [e.seed for e in source] == [None, 11]
    assert source.metadata["env_id"] == ENV and source.metadata["author"] == ["me"]
    with pytest.raises(ConfigError, match="exists"):
        write_dataset(ID, episodes, env_id=ENV)
    spaces = {"observation_space": Marked.observation_space, "action_space": Marked.action_space}
    write_dataset(ID, episodes[:1], **spaces, overwrite=True)
    assert len(load_episodes(ID)) == 1 and "env_id" not in load_episodes(ID).metadata
    with pytest.raises(ConfigError, match="env_id: give it"):
        write_dataset("tests/b-v0", episodes)


@pytest.mark.fault("Recording", "a bad episode among those to write", "nothing is written")
def test_write_dataset_writes_whole_or_nothing() -> None:
    def broken() -> Any:
        yield an_episode()
        raise Interrupt

    for episodes, error in (
        (broken(), Interrupt),
        ([an_episode(), an_episode(costs=None)], InputError),
        ([an_episode(rewards=np.full(5, np.nan))], DataError),
        ([an_episode(actions=np.full((5, 1), 3.0))], DataError),
        ([], InputError),
    ):
        with pytest.raises(error):
            write_dataset(ID, episodes, env_id=ENV)
        assert not Place(ID).final.exists() and not Place(ID).staging.exists()
    assert not minari.list_local_datasets()


def test_reference_scores_come_in_pairs() -> None:
    for low, high in ((1.0, None), (None, 1.0), (2.0, 1.0), (0.0, np.inf)):
        with pytest.raises(ConfigError, match="ref_min_score"):
            DatasetInfo(ref_min_score=low, ref_max_score=high)


def test_sources_can_be_sent_to_other_processes() -> None:
    quiet(Noisy(), ENV, ID, episodes=3, seed=0)
    source = load_episodes(ID)
    assert_same(pickle.loads(pickle.dumps(source)), source)
