"""Small networks sample with one thread, large ones with all, and the number is restored."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import tiny_agent

from mpd_gym.agents import mpdiffuser
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.models.backends import threads as module
from mpd_gym.models.backends.threads import enough_threads, multiplications, threads


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_the_number_grows_with_network_and_batch() -> None:
    with torch.device("meta"):
        laptop, paper = (
            TrajectoryDenoiser(DenoiserConfig(11, 3, 32, unet=unet))
            for unet in (UnetConfig(32, (1, 2, 4)), UnetConfig())
        )
    counts = [enough_threads(multiplications(laptop, rows)) for rows in (2, 16, 128)]
    assert counts[:2] == [1, 1]
    assert counts[2] > 1
    assert enough_threads(multiplications(paper, 2)) > 1


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (2, 2), (3, 3), (8, 3)])
def test_no_more_than_the_caller_has_and_as_many_as_before_afterwards(
    most: int, expected: int
) -> None:
    with threads(most):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 3
    with pytest.raises(RuntimeError, match="stop"), threads(most):
        raise RuntimeError("stop")
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("limit", "expected"), [(1, 3), (2**40, 1)])
def test_agents_sample_with_them(
    limit: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    real = mpdiffuser.sample

    def watched(*arguments: object) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(mpdiffuser, "sample", watched)
    monkeypatch.setattr(module, "MULTIPLICATIONS_PER_THREAD", limit)
    tiny_agent().predict(np.zeros(2, np.float32))
    assert seen == {expected}
    assert torch.get_num_threads() == 3
