"""The place where a folder grows: hidden beside its own place, for one conversion at a time.

What a killed conversion leaves there is where the next one goes on. Whatever stops a conversion, its own place holds
the old folder, the new one, or nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from checkpoints.errors import CheckpointError
from checkpoints.groups import Group
from checkpoints.manifest import Manifest, entry_of, flush, group_bytes, read_manifest, write_manifest
from checkpoints.store import WEIGHTS, is_converted

_SAYS_FULL = re.compile(r"No space left|ENOSPC|Disk quota exceeded")


@dataclasses.dataclass
class Unfinished:
    """A folder that grows. `finished` has the names of the groups that are in it for good."""

    folder: Path
    manifest: Manifest

    @property
    def store(self) -> Path:
        """Where groups are written."""
        return self.folder / WEIGHTS

    @property
    def finished(self) -> set[str]:
        """Names of the groups that need not be made again."""
        return set(self.manifest.entries)

    def finish(self, group: Group) -> None:
        """Notes that the files of a group are complete, when they are on the disk."""
        entry = entry_of(self.store, group)
        self.manifest = Manifest(self.manifest.key, {**self.manifest.entries, group.name: entry})
        write_manifest(self.store, self.manifest)


@contextlib.contextmanager
def unfinished_folder(out: Path, key: str) -> Iterator[Unfinished]:
    """A folder that takes the place `out` when the block ends well.

    When it does not, finished groups stay in a hidden folder beside `out`, from where the next conversion with the same
    `key` goes on; a CheckpointError in the block and a conversion with another key remove them.
    Raises CheckpointError when `out` holds something else than a converted folder, when another conversion to it is
    running, and when the disk is full or cannot be written.
    """
    if out.exists() and not is_converted(out):
        raise CheckpointError(f"{out} exists and is not a converted folder: choose another place or remove it")
    temporary = out.with_name(f".{out.name}.unfinished")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(temporary, out), _kept_if_useful(temporary):
            _remove_leftovers(out)
            growing = _open(temporary, key)
            yield growing
            for path in [*(path for path in temporary.iterdir() if path.is_file()), temporary]:
                flush(path)
            _replace(temporary, out)
    except (OSError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # Orbax reports a full disk as a ValueError, in the words of its storage library.
        if full or (not isinstance(error, CheckpointError) and _SAYS_FULL.search(str(error))):
            kept = f"; what is done so far is kept in {temporary}" if temporary.exists() else ""
            raise CheckpointError(
                f"the disk of {out.parent} is full: free some space and run the same command again{kept}"
            ) from error
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {out}: {error.strerror or error}; choose another place") from error
        raise


@contextlib.contextmanager
def _alone(temporary: Path, out: Path) -> Iterator[None]:
    """Holds a lock on the folder itself; the system lets go of it when its process ends, however it ends."""
    descriptor = _lock(temporary, out)
    while descriptor is None:
        descriptor = _lock(temporary, out)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(temporary: Path, out: Path) -> int | None:
    """None when another conversion finished in between and took the folder away."""
    temporary.mkdir(exist_ok=True)
    try:
        descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), temporary.stat()):
            return descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"another conversion to {out} is running: wait until it has ended or choose another place"
        ) from None
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextlib.contextmanager
def _kept_if_useful(temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if isinstance(error, CheckpointError) or not _has_groups(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _has_groups(temporary: Path) -> bool:
    try:
        return bool(read_manifest(temporary / WEIGHTS).entries)
    except CheckpointError:
        return False


def _open(temporary: Path, key: str) -> Unfinished:
    """What an earlier conversion with the same key left, without what it had not finished; or a fresh start."""
    store = temporary / WEIGHTS
    try:
        found = read_manifest(store)
    except CheckpointError:
        found = Manifest("", {})
    kept = {
        name: entry
        for name, entry in found.entries.items()
        if found.key == key and (store / name).is_dir() and group_bytes(store / name) == entry.bytes
    }
    for path in temporary.iterdir():
        if path != store:
            _remove(path)
    store.mkdir(exist_ok=True)
    for path in store.iterdir():
        if path.name not in kept:
            _remove(path)
    manifest = Manifest(key, kept)
    write_manifest(store, manifest)
    return Unfinished(temporary, manifest)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _replace(temporary: Path, out: Path) -> None:
    old = None
    if out.exists():
        old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
        out.rename(old)
    temporary.rename(out)
    flush(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Folders that a conversion had replaced and could not remove any more; only the holder of the lock comes here."""
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.*.old"):
        if out.exists():
            shutil.rmtree(leftover, ignore_errors=True)
