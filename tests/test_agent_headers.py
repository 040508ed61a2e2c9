"""A header that someone edited, with a digest that is right again: an agent, or a typed error."""

from __future__ import annotations

import copy
import json
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_peers import LQR, fitted

from mpd_gym.agents import AGENTS, load_agent, serialization
from mpd_gym.agents.serialization import shipped_agents
from mpd_gym.checkpoint import load_file, save_file
from mpd_gym.errors import CheckpointError, MpdError

SECONDS, BYTES = 20, 2**30  # that one load, and one action, may take
WRITTEN = ("format_version", "kind", "package_version")


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        "",
        "x",
        "8",
        "return",
        "../x",
        -1,
        0,
        1,
        2,
        3,
        7,
        0.5,
        -0.5,
        1e-300,
        1e300,
    ),
    *(2**20, 2**31, 10**9, 2**63, 10**18, 10**400, -(10**400), [], {}, [[]], [None], {"a": 1}),
    *([1] * 1_000, [2**20, 2**20], [1.5, "a"], nested(90), "a" * 10_000),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values within one."""
    yield path
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    for key, entry in inside:
        yield from places(entry, (*path, key))


def edited(header: dict[str, Any], rng: np.random.Generator) -> tuple[dict[str, Any], str]:
    """A header with one or two values replaced, left out, added or repeated, and what was done."""
    header, told = copy.deepcopy(header), []
    for _ in range(int(rng.integers(1, 3))):
        paths = list(places(header))[1:]
        *outer, key = paths[rng.integers(len(paths))]
        holder: Any = header
        for step in outer:
            holder = holder[step]
        value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        match rng.integers(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                key, holder["extra"] = "extra", value
            case 2 if isinstance(holder[key], list):
                holder[key] *= 3
            case 3 if isinstance(holder[key], (int, float)):
                holder[key] *= -(2**20)
            case _:
                holder[key] = value
        told.append(f"{[*outer, key]}: {str(value)[:40]}")
    return header, "; ".join(told)


@contextmanager
def bounded() -> Iterator[None]:
    """Bound time and memory of a block."""

    def end(*_: Any) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, end)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def acted(load: Callable[[], Any], observation: Any) -> Any:
    """The agent's action, or the type of the error that loading or acting gave."""
    with bounded():
        try:
            agent = load()
        except CheckpointError:
            return None
        try:
            agent.reseed(0)
            action, _ = agent.predict(observation, deterministic=True)
        except MpdError:  # such as options that are legal, and ask for what the agent lacks
            return None
    assert agent.action_space.contains(action)
    return action


def play_edits(path: Path, edits: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Load a file with each of many edited headers; return how many loaded and acted."""
    agent = load_agent(path)
    observation = agent.observation_space.sample()
    agent.observation_space.seed(0)
    expected = acted(lambda: load_agent(path), observation)
    tensors, header = load_file(path)
    plain = {key: value for key, value in header.items() if key not in WRITTEN}
    spaces = [key for key in plain if key.endswith("_space")]
    opened = {**plain, **{key: json.loads(plain[key]) for key in spaces}}
    rng, loaded = np.random.default_rng(0), 0
    for _ in range(edits):
        changed, told = edited(opened, rng)
        closed = {
            key: json.dumps(value) if key in spaces and rng.random() < 0.95 else value
            for key, value in changed.items()
        }
        with monkeypatch.context() as patch:
            patch.setattr(
                serialization, "load_file", lambda *_, closed=closed, **__: (tensors, closed)
            )
            try:
                action = acted(lambda: load_agent(path), observation)
            except BaseException as error:
                error.add_note(told)
                raise
        loaded += action is not None
        if action is not None and all(part.startswith("['history'") for part in told.split("; ")):
            np.testing.assert_array_equal(action, expected)
    return loaded


@pytest.fixture(scope="module", params=[*AGENTS])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small agent of every method."""
    path = tmp_path_factory.mktemp("agents") / f"{request.param}.safetensors"
    fitted(request.param, LQR, reward_model=True).save(path)
    return path


@pytest.fixture(scope="module")
def with_inverse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("agents") / "agent.safetensors"
    fitted("mpdiffuser", LQR, inverse_dynamics=True).save(path)
    return path


@pytest.mark.fault(
    "Files",
    "edited headers with a right digest: types, sizes, huge, negative, missing, extra, nested",
    "an agent that acts, or CheckpointError, in bounded time and memory",
)
def test_an_edited_header_is_an_agent_or_a_typed_error(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < play_edits(file, 25, monkeypatch) < 25


@pytest.mark.fault(
    "Files",
    "a small file of a network 2^20 wide, with a billion levels or steps, with 500,000 layers",
    "refused within a second: sizes are compared with the tensors before anything is built",
)
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("unet", {"width": 2**20}, "expected float32"),
        ("unet", {"multipliers": [1, 10**9]}, "does not describe an agent"),
        ("unet", {"multipliers": [1] * 500_000}, "at most 64 layers; got 500000"),
        ("unet", {"kernel_size": 2**62 + 1}, "header does not describe an agent"),
        ("inverse_hidden", [2**30, 2**30], "expected float32"),
        ("diffusion_steps", 10**9, "diffusion_steps: expected an integer from 2 to 10000"),
        ("horizon", 2**30, "horizon: expected an integer from 1 to 65536"),
        ("sampling", {"num_candidates": 10**9}, "num_candidates: expected at most 2,097,152"),
        ("seed", "7", r"MPDiffuserConfig\.seed: expected int; got '7'"),
        ("discount", 10**400, r"MPDiffuserConfig\.discount: expected float"),
    ],
)
def test_a_crafted_file_takes_no_time_and_no_memory(
    name: str, value: Any, reason: str, with_inverse: Path, tmp_path: Path
) -> None:
    path = tmp_path / "agent.safetensors"
    tensors, header = load_file(with_inverse)
    for key in WRITTEN:
        del header[key]
    known = header["config"][name]
    header["config"][name] = known | value if isinstance(value, dict) else value
    save_file(path, tensors, header, kind="agent")
    begun = time.process_time()
    with bounded(), pytest.raises(CheckpointError, match=reason) as caught:
        load_agent(path)
    assert time.process_time() - begun < 2 and str(caught.value).startswith(str(path))


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.fault(
    "Files",
    "1,000 edited headers of the shipped agents",
    "an agent that acts, or CheckpointError, in bounded time and memory",
)
@pytest.mark.parametrize("name", sorted(shipped_agents()))
def test_many_edited_headers_of_shipped_agents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < play_edits(shipped_agents()[name], 250, monkeypatch) < 250
