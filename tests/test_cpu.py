"""Which CPUs multiply matrices slowly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mpd_gym.models.backends import cpu


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    cpu.multiplies_slowly.cache_clear()
    yield
    cpu.multiplies_slowly.cache_clear()


@pytest.mark.parametrize(
    ("mkl", "description", "expected"),
    [
        (True, "vendor_id : AuthenticAMD", True),
        (True, "vendor_id : GenuineIntel", False),
        (True, "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel", False),  # Windows
        (False, "vendor_id : AuthenticAMD", False),  # another library multiplies
        (False, "arm", False),
    ],
)
def test_mkl_is_slow_where_the_cpu_is_not_intels(
    mkl: bool, description: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(cpu, "description", lambda: description)
    assert cpu.multiplies_slowly() is expected


def test_a_description_stays_the_same() -> None:
    cpu.description.cache_clear()
    first = cpu.description()
    cpu.description.cache_clear()
    assert cpu.description() == first
    assert "MHz" not in first  # which changes from call to call


def test_a_system_without_cpuinfo_is_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(cpu.Path, "read_text", missing)
    monkeypatch.setattr(cpu.platform, "processor", lambda: "some CPU")
    cpu.description.cache_clear()
    assert cpu.description() == "some CPU"
    cpu.description.cache_clear()
