"""The manifest of a store: which groups it has, how large they are, and their checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from checkpoints.errors import CheckpointError, first_line
from checkpoints.groups import Group
from dflash_jax.console import Bytes

FILE = "manifest.json"
_BUFFER = 4 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """A group on the disk. `sha256` covers names, sizes and contents of its files, `bytes` their sizes."""

    group: Group
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`key` says what the groups were made from and how; only groups with one key belong together."""

    key: str
    entries: Mapping[str, Entry]

    @property
    def bytes(self) -> int:
        """Bytes of all groups."""
        return sum(entry.bytes for entry in self.entries.values())


def read_manifest(store: Path) -> Manifest:
    """The manifest of the store in a folder. Raises CheckpointError when there is none or it is damaged."""
    file = store / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = {
            str(name): Entry(Group.from_json(name, fields["pieces"]), int(fields["bytes"]), str(fields["sha256"]))
            for name, fields in content["groups"].items()
        }
        return Manifest(str(content["key"]), entries)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; convert the model again") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {first_line(error)}; convert the model again") from error


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Puts the manifest into a store's folder in one step: a reader sees the old one or the new one."""
    groups = {
        name: {"pieces": entry.group.to_json(), "bytes": entry.bytes, "sha256": entry.sha256}
        for name, entry in manifest.entries.items()
    }
    temporary = store / f"{FILE}.new"
    temporary.write_text(json.dumps({"key": manifest.key, "groups": groups}) + "\n", encoding="utf-8")
    flush(temporary)
    temporary.replace(store / FILE)
    flush(store)


def entry_of(store: Path, group: Group) -> Entry:
    """The entry of a group whose files are in the store, and on the disk when this returns."""
    folder = store / group.name
    size, digest = _checksum(folder)
    for path in [*folder.rglob("*"), folder]:
        flush(path)
    return Entry(group, size, digest)


def verify(store: Path, progress: Callable[[str, int, int], None] | None = None) -> list[str]:
    """Reads all files of a store and says of every damaged group what is wrong with it, a line each."""
    manifest = read_manifest(store)
    wrong, done = [], 0
    for name, entry in manifest.entries.items():
        if progress:
            progress("verifying", Bytes(done), Bytes(manifest.bytes))
        done += entry.bytes
        folder = store / name
        try:
            if not folder.is_dir():
                wrong.append(f"group {entry.group} is missing")
            elif _checksum(folder) != (entry.bytes, entry.sha256):
                wrong.append(f"group {entry.group} is damaged: its checksum differs")
        except OSError as error:
            wrong.append(f"group {entry.group} cannot be read: {error.strerror}")
    return wrong


def group_bytes(folder: Path) -> int:
    """Sizes of the files of a group."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def flush(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(folder: Path) -> tuple[int, str]:
    digest, total = hashlib.sha256(), 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}\0{size}\0".encode())
        total += size
        with file.open("rb", buffering=0) as content:
            while block := content.read(_BUFFER):
                digest.update(block)
    return total, digest.hexdigest()
