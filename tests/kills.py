"""Kill −9 at random moments of save, train, collect and compare; run me for a thousand of them.

    python tests/kills.py --kills 1000 --seed 0 --record docs/kills.json

The work runs in forked children of this process, which has imported everything, so that a kill
costs a second or less. Each round kills the same work one to four times, checks after each kill
that nothing is lost, then lets it run to its end: the folder must hold what an undisturbed run
leaves, bit for bit, and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
import torch.utils.tensorboard
from helpers import TINY, source
from recorders import ENV, ID, Noisy

from mpd_gym import MPDiffuserAgent, compare
from mpd_gym.agents import load_agent
from mpd_gym.checkpoint import load_file
from mpd_gym.collect.record import record
from mpd_gym.collect.storage import Place, Status
from mpd_gym.datasets import load_episodes
from mpd_gym.errors import CheckpointError, ConfigError

ROUND = 4  # kills at most, before the work may end
Tell = Callable[[int], None]


class Lost(Exception):
    """What was there before a kill is not, or is not whole."""


class Work:
    """One kind of work in a folder.

    Args:
        home: Folder of what all rounds share, with the files of two agents.

    Attributes:
        last: Share of the work that follows when it tells of its last part; half the kills of such
            work hit that.
    """

    last = 0.0

    def __init__(self, home: Path) -> None:
        self.home = home
        self.files = sorted(home.glob("agent-*.safetensors"))
        self.agents = [load_agent(path) for path in self.files]

    def begin(self, folder: Path) -> None:
        """Put there what is there before the work."""

    def run(self, folder: Path, tell: Tell) -> None:
        """Work to the end, or until killed; tell how far it is, which no kill may undo."""
        raise NotImplementedError

    def check(self, folder: Path) -> int:
        """Return how far the work is after a kill; raise `Lost` if a file is not whole."""
        raise NotImplementedError

    def contents(self, folder: Path) -> dict[str, Any]:
        """What two runs must leave alike, by file."""
        raise NotImplementedError


class Save(Work):
    """Two agents are saved over each other, again and again."""

    def begin(self, folder: Path) -> None:
        shutil.copy(self.files[0], folder / "agent.safetensors")

    def run(self, folder: Path, tell: Tell) -> None:
        for turn in range(4):
            self.agents[turn % 2].save(folder / "agent.safetensors")

    def check(self, folder: Path) -> int:
        whole(folder / "agent.safetensors")
        if digest(folder / "agent.safetensors") not in map(digest, self.files):
            raise Lost("neither the old agent nor the new one")
        return 0

    def contents(self, folder: Path) -> dict[str, Any]:
        return {name: digest(folder / name) for name in files(folder)}


class Train(Work):
    """An agent of two networks is trained with checkpoints, and saved."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.data = source("LQR-v0")
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports what takes seconds

    def run(self, folder: Path, tell: Tell) -> None:
        few = {"steps": 8, "checkpoint_every": 2, "ema_every": 2, "log_every": 4}
        settings = dataclasses.replace(TINY.training, **few)
        config = dataclasses.replace(TINY, training=settings)
        agent = MPDiffuserAgent.fit(self.data, config, directory=folder, progress=False)
        agent.save(folder / "agent.safetensors")

    def check(self, folder: Path) -> int:
        """Steps of the newest checkpoints."""
        newest: dict[Path, int] = {}
        for path in (*folder.glob("*/previous.safetensors"), *folder.glob("*/checkpoint.*")):
            newest[path.parent] = whole(path)["step"]
        return sum(newest.values())

    def contents(self, folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in files(folder):
            if "events.out.tfevents" in name:  # each run writes its own
                continue
            found[name] = None
            if name.endswith(".safetensors") and "/." not in f"/{name}":  # of killed runs
                tensors, header = load_file(folder / name)
                for timed in ("seconds", "history"):
                    header.pop(timed, None)
                parts = {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}
                found[name] = hashlib.sha256(repr((parts, header)).encode()).hexdigest()
        return found


class Collect(Work):
    """Episodes are recorded as a Minari data set."""

    def run(self, folder: Path, tell: Tell) -> None:
        os.environ["MINARI_DATASETS_PATH"] = str(folder)
        told = {"on_stored": lambda now: tell(now.stored)}
        try:
            record(Noisy(0.001), ENV, ID, episodes=30, seed=3, progress=False, **told)
        except ConfigError:  # killed after its end
            if not Place(ID).final.exists():
                raise

    def check(self, folder: Path) -> int:
        os.environ["MINARI_DATASETS_PATH"] = str(folder)
        place = Place(ID)
        if place.final.exists():
            return len(load_episodes(ID))
        decided = [decision for decision, _ in place.decisions().values()]
        stored = [one.candidate for one in decided if one.status is Status.STORED]
        return len(list(place.episodes(stored)))

    def contents(self, folder: Path) -> dict[str, Any]:
        os.environ["MINARI_DATASETS_PATH"] = str(folder)
        rows = [
            (one.observations.tobytes(), one.actions.tobytes(), one.rewards.tobytes())
            for one in load_episodes(ID)
        ]
        return {**dict.fromkeys(files(folder)), "episodes": rows}


class Compare(Work):
    """Policies are compared, with tables and a film, over the files of a comparison before."""

    last = 0.2

    def begin(self, folder: Path) -> None:
        before = self.home / "before"
        if not before.exists():
            undisturbed(lambda: self._compare(before, 2, lambda _: None))
        shutil.copytree(before, folder, dirs_exist_ok=True)

    def run(self, folder: Path, tell: Tell) -> None:
        self._compare(folder, 3, tell)

    def check(self, folder: Path) -> int:
        old, new = (self.contents(self.home / name) for name in ("before", "whole-compare"))
        found = self.contents(folder)
        for name in old:
            if found.get(name) not in (old[name], new[name]):
                raise Lost(f"{name} is neither the old file nor the new one")
        return 0

    def contents(self, folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {name: digest(folder / name) for name in files(folder)}
        if "summary.csv" in found:  # all but its times
            rows = [line.split(",") for line in (folder / "summary.csv").read_text().split()]
            kept = [place for place, name in enumerate(rows[0]) if not name.startswith("ms_")]
            found["summary.csv"] = [[row[place] for place in kept] for row in rows]
        return found

    def _compare(self, folder: Path, seeds: int, tell: Tell) -> None:
        quick = [agent.with_options(num_steps=2) for agent in self.agents]
        compare(
            dict(zip(("one", "other"), quick, strict=True)),
            "LQR-v0",
            seeds=seeds,
            env_kwargs={"max_episode_steps": 4},
            folder=folder,
            on_played=lambda _: tell(0),
        )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def whole(path: Path) -> dict[str, Any]:
    """The header of a file that must be whole."""
    try:
        return load_file(path)[1]
    except CheckpointError as error:
        raise Lost(str(error)) from error


def files(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not, folders too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def forked(work: Callable[[Tell], None]) -> tuple[int, int]:
    """Run something in a child; return its process id, and a pipe with what it tells."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    _in_child(work, writing)


def _in_child(work: Callable[[Tell], None], writing: int) -> NoReturn:
    try:
        work(lambda number: os.write(writing, f"{number}\n".encode()) and None)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(child: int, pipe: int) -> tuple[int, int]:
    """Wait for a child; return its exit code, or minus its signal, and the last that it told."""
    _, status = os.waitpid(child, 0)
    with open(pipe) as told:
        numbers = [int(line) for line in told.read().split()]
    return os.waitstatus_to_exitcode(status), numbers[-1] if numbers else 0


def undisturbed(work: Callable[[], None]) -> float:
    """Run something in a child to its end; return the seconds it took."""
    begun = time.monotonic()
    code, _ = ended(*forked(lambda _: work()))
    if code:
        raise RuntimeError(f"an undisturbed run ended with exit code {code}")
    return time.monotonic() - begun


def killed(work: Work, folder: Path, seconds: float, *, last: bool) -> tuple[bool, int]:
    """Run work, and kill it after some time; return whether it still ran, and what it told.

    With `last` the time begins when the work tells of its last part.
    """
    child, pipe = forked(lambda tell: work.run(folder, tell))
    if last:
        os.read(pipe, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # not reaped yet, so that it is ours
    code, told = ended(child, pipe)
    if code > 0:
        raise Lost("a killed run could not be continued, see the traceback above")
    return code == -signal.SIGKILL, told


class Trial:
    """Kills of one kind of work, and what went wrong.

    Args:
        work: The work.
        seed: Of the moments.
    """

    def __init__(self, work: Work, seed: int) -> None:
        self.work, self.name = work, type(work).__name__.lower()
        self.chance = random.Random(f"{seed} {self.name}")
        self.counts = Counter[str](kills=0, lost=0, left=0, different=0, rounds=0)
        for folder in (work.home / f"first-{self.name}", work.home / f"whole-{self.name}"):
            folder.mkdir()
            work.begin(folder)
            self.seconds = undisturbed(lambda folder=folder: self._warm(folder))
            for module in json.loads((work.home / "modules.json").read_text()):
                with contextlib.suppress(Exception):  # so that no child imports it again
                    importlib.import_module(module)
        self.expected = work.contents(folder)

    def _warm(self, folder: Path) -> None:
        """Work undisturbed, and write down which modules that took."""
        self.work.run(folder, lambda _: None)
        (self.work.home / "modules.json").write_text(json.dumps([*sys.modules]))

    def round(self, most: int) -> None:
        """Kill the work up to `most` times, let it end, and compare what it leaves."""
        folder = Path(tempfile.mkdtemp(dir=self.work.home))
        self.work.begin(folder)
        reached, end = 0, self.counts["kills"] + self.chance.randint(1, min(ROUND, most))
        while self.counts["kills"] < end:
            try:
                hit, reached = self._kill(folder, reached)
            except Lost as problem:
                hit = self._wrong("lost", str(problem))
            if not hit:  # the work has come to its end
                break
        undisturbed(lambda: self.work.run(folder, lambda _: None))
        found = self.work.contents(folder)
        if surplus := found.keys() - self.expected.keys():
            self._wrong("left", f"left {sorted(surplus)}")
        if {key: found.get(key) for key in self.expected} != self.expected:
            self._wrong("different", "another result")
        shutil.rmtree(folder)
        self.counts["rounds"] += 1

    def _kill(self, folder: Path, reached: int) -> tuple[bool, int]:
        """Kill the work once; return whether it still ran, and how far it is: never less far."""
        last = self.chance.random() < 0.5 and self.work.last > 0
        wait = self.chance.uniform(0, self.seconds) * (self.work.last if last else 1)
        hit, told = killed(self.work, folder, wait, last=last)
        self.counts["kills"] += hit
        now = self.work.check(folder)
        if now < max(reached, told):
            raise Lost(f"the work was at {max(reached, told)}, and is at {now}")
        return hit, now

    def _wrong(self, kind: str, problem: str) -> bool:
        self.counts[kind] += 1
        print(f"{self.name}: {problem}", file=sys.stderr, flush=True)
        return False


def make_agents(home: Path) -> None:
    """Train two agents; in a child, as no process may fork after a backward pass."""
    data = source("LQR-v0")
    for seed in range(2):
        agent = MPDiffuserAgent.fit(data, dataclasses.replace(TINY, seed=seed), progress=False)
        agent.save(home / f"agent-{seed}.safetensors")


def main() -> None:
    """Kill as often as asked, and print what went wrong, as JSON."""
    parser = argparse.ArgumentParser(description="Kill save, train, collect and compare.")
    parser.add_argument("--kills", type=int, default=8, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="file for the counts")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begun, asked = time.monotonic(), ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        undisturbed(lambda: make_agents(home))
        trials = [Trial(kind(home), chosen.seed) for kind in (Save, Train, Collect, Compare)]
        while missing := chosen.kills - sum(trial.counts["kills"] for trial in trials):
            trial = min(trials, key=lambda trial: trial.counts["kills"])
            trial.round(min(missing, -(-chosen.kills // 4) - trial.counts["kills"]))
            told = {
                "command": f"python tests/kills.py --kills {chosen.kills} --seed {chosen.seed}",
                "commit": commit,
                "seconds": round(time.monotonic() - begun),
                "counts": {trial.name: trial.counts for trial in trials},
            }
            if chosen.record is not None:
                chosen.record.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
