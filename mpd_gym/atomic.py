"""Files are written whole or not at all, under names that stay in their folder."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mpd_gym.errors import ConfigError, FileError

if os.name == "posix":
    import fcntl

__all__ = [
    "atomic_path",
    "check_writable",
    "file_name",
    "lock_file",
    "sync_directory",
    "user_path",
    "write_csv",
    "writing",
]

_MARK = "-writing-"
_LONGEST_NAME = 100  # characters; file systems take 255 bytes, and callers add to a name
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\.|$)", re.IGNORECASE)  # on Windows


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file in the folder of `path`; rename it to `path` if the block succeeds.

    The data reaches the disk before the rename, the folder's entry after it. So after a crash or
    kill −9 `path` holds its old or its new content, never a part. The next call removes the
    temporary files that killed processes left.

    Args:
        path: Final path; its folder is created if missing.

    Yields:
        Path to write to, with the same suffix as `path`.

    Raises:
        FileError: If it cannot be written.
    """
    target = user_path(path)
    if target.is_symlink():  # its target is what others read
        target = Path(os.path.realpath(target))
    with writing(target), ExitStack() as leaving, ExitStack() as held:
        target.parent.mkdir(parents=True, exist_ok=True)
        begins = f".{target.stem}{_MARK}"
        _remove_leftovers(target.parent, begins, target.suffix)
        handle, name = tempfile.mkstemp(prefix=begins, suffix=target.suffix, dir=target.parent)
        temporary = Path(name)
        leaving.callback(temporary.unlink, missing_ok=True)
        held.callback(os.close, handle)
        _locks(handle)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if os.name == "nt":  # Windows renames no open file
            held.close()
        os.replace(temporary, target)
        sync_directory(target.parent)


@contextmanager
def writing(target: object) -> Iterator[None]:
    """Turn errors of the system, such as a full disk, into one that names what is written.

    Raises:
        FileError: If the block raises an OSError.
    """
    try:
        yield
    except OSError as error:
        raise FileError(
            f"{target}: cannot be written ({error}); free space, or choose another folder"
        ) from error


def _remove_leftovers(folder: Path, begins: str, suffix: str) -> None:
    """Remove the temporary files of processes that died; those of living ones are locked."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in [one for one in entries if one.name.startswith(begins)]:
            if entry.name.endswith(suffix) and entry.is_file(follow_symlinks=False):
                with open(entry.path, "rb") as file:
                    if _locks(file.fileno()):
                        os.unlink(entry.path)


def _locks(handle: int) -> bool:
    """Lock a file until its handle is closed or the process dies; False where that cannot be."""
    if os.name == "posix":
        with suppress(OSError):  # locked by another, or a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def check_writable(folder: str | os.PathLike[str], size: int = 2**20) -> None:
    """Make a folder and check that files can be written to it, before work that ends in files.

    Args:
        folder: The folder.
        size: Bytes that must be free.

    Raises:
        FileError: If it cannot be made or written to, or holds no `size` more bytes.
    """
    probe = user_path(folder) / "probe"
    with atomic_path(probe) as temporary:
        temporary.write_bytes(bytes(min(size, 2**20)))
    probe.unlink()
    free = shutil.disk_usage(probe.parent).free
    if free < size:
        raise FileError(
            f"{probe.parent}: {size / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free; free "
            "space, or choose another folder"
        )


def file_name(text: str) -> str:
    """Turn a name from data or a user, such as an environment's id, into one part of a path.

    A name of ASCII letters, digits and ``_ . -`` stays as it is. Any other one is changed (no
    separator, no ``..``, not hidden, not a device, not empty, at most 112 characters) and ends in
    a digest of the original, so that two names never share a path.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip(".-")[:_LONGEST_NAME]
    safe = f"_{safe}" if _DEVICES.match(safe) else safe
    if safe == text and text:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe or 'unnamed'}-{digest}"


def lock_file(path: Path, taken: str) -> IO[bytes]:
    """Open and lock a file; the lock ends when it is closed, or with the process.

    Args:
        path: The file; it and its folder are made if missing.
        taken: Message of the error.

    Raises:
        ConfigError: If it is locked, also by this process.
        FileError: If it cannot be made or locked.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError), ExitStack() as held:  # the last holder has removed it
                file = held.enter_context(open(path, "ab"))
                if os.name == "posix":
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    held.pop_all()
                    return file
        except BlockingIOError as error:
            raise ConfigError(taken) from error
        except OSError as error:
            raise FileError(f"{path}: cannot be locked ({error}); choose another folder") from error


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a CSV file, with a column for every key and empty cells for missing keys."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def sync_directory(path: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a crash."""
    if os.name == "nt":  # Windows cannot open folders, and journals renames
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user means it: no shell expands ``~`` in ``--output=~/x`` and ``sb3:~/x.zip``."""
    return Path(os.path.expanduser(path))


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
