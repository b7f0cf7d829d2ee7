"""Conversions: streamed, stopped in every way, continued, refused; and what a damaged folder says."""

from __future__ import annotations

import dataclasses
import errno
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from checkpoints import conversion, groups
from checkpoints.errors import CheckpointError
from checkpoints.formats import encode
from checkpoints.hf_source import read_folder
from checkpoints.readers import CheckpointWarning
from checkpoints.source import RowReader, Source
from checkpoints.store import split
from checkpoints.unfinished import unfinished_folder
from dflash_jax.models.parameters import Parameter
from pallas_kernels.quantised_matmul.api import W4, dequantise

pytestmark = pytest.mark.slow

FORMATS = [("f32", 32), ("bf16", 32), ("w8", 32), ("w4", 32), ("w4", 128)]


@pytest.fixture
def source(goldens: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(goldens / "qwen3", tmp_path / "source"))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix or two per group, and matrices of more than 8 kB come in pieces."""
    monkeypatch.setattr(conversion, "plan", small_plan)


def small_plan(table: Any, piece_bytes: int = 8000) -> list[groups.Group]:
    return groups.plan(table, min(piece_bytes, 8000))


def contents(folder: Path) -> dict[str, np.ndarray]:
    parts = {name: split(weight) for name, weight in checkpoints.load(folder).parameters.items()}
    return {f"{name}/{part}": np.asarray(array) for name, each in parts.items() for part, array in each.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def refusal(function: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hidden(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize(("weights", "group_size"), FORMATS)
@pytest.mark.parametrize("pieces", [False, True])
def test_what_is_loaded_is_what_was_encoded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, group_size: int, pieces: bool
) -> None:
    if pieces:
        monkeypatch.setattr(conversion, "plan", small_plan)
    out = tmp_path / "out"
    done = checkpoints.convert(source, out, weights=weights, group_size=group_size)
    opened = read_folder(source)
    expected = {}
    for name, parameter in opened.table.items():
        for part, array in split(encode(name, parameter, opened.readers[name](), weights, group_size)).items():
            expected[f"{name}/{part}"] = np.asarray(array)
    assert_same(contents(out), expected)
    assert (done.continued, done.groups > 1) == (0, pieces)
    assert hidden(out) == []
    assert checkpoints.verify(out) == []


def test_a_folder_of_before_has_bfloat16_scales(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_as_before(name: str, *arguments: Any) -> Any:
        weight = encode(name, *arguments)
        if not isinstance(weight, W4):
            return weight
        return dataclasses.replace(weight, scales=np.asarray(weight.scales).astype(jnp.bfloat16))

    monkeypatch.setattr(conversion, "encode", encode_as_before)
    checkpoints.convert(source, tmp_path / "out", weights="w4")
    opened = read_folder(source)
    name = "layers.0.mlp.up"
    before = encode_as_before(name, opened.table[name], opened.readers[name](), "w4", 32)
    found = checkpoints.load(tmp_path / "out").parameters[name]
    assert isinstance(found, W4) and found.scales.dtype == jnp.float16
    np.testing.assert_array_equal(dequantise(found), dequantise(before))


def test_weights_that_w4_cannot_hold_are_told_of() -> None:
    values = np.ones((2, 128), np.float32)
    encode("layers.0.mlp.up", Parameter((2, 128), matrix=True), values * 5e5, "w4", 32)
    with pytest.warns(CheckpointWarning, match=r"layers\.0\.mlp\.up has weights beyond 524032, which w4 cuts off"):
        encode("layers.0.mlp.up", Parameter((2, 128), matrix=True), values * 6e5, "w4", 32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weights", ["w4", "w8"])
def test_of_weights_that_are_not_finite_the_reader_alone_tells(weights: str, value: float) -> None:
    values = np.ones((2, 128), np.float32)
    values[1, 5] = value
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        encode("layers.0.mlp.up", Parameter((2, 128), matrix=True), values, weights, 32)
    assert [str(each.message) for each in told] == []


class _Rows:
    """Reads rows alone and counts what of it is still held."""

    def __init__(self, reader: Callable[[], np.ndarray], held: list[weakref.ref[np.ndarray]]) -> None:
        self.reader, self.held, self.most = reader, held, 0

    def __call__(self) -> np.ndarray:
        return self._note(self.reader())

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._note(self.reader()[start:stop].copy())

    def _note(self, values: np.ndarray) -> np.ndarray:
        gc.collect()
        assert sum(ref() is not None for ref in self.held) <= 1  # the one before, while this one replaces it
        if values.ndim == 2:  # norms stay as they are until their group is written
            self.held.append(weakref.ref(values))
        return values


@pytest.mark.usefixtures("small_groups")
def test_what_was_read_is_forgotten_before_more_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[np.ndarray]] = []

    def read(path: Path) -> Source:
        opened = read_folder(path)
        readers = {name: _Rows(reader, held) for name, reader in opened.readers.items()}
        assert all(isinstance(reader, RowReader) for reader in readers.values())
        return conversion.dataclasses.replace(opened, readers=readers)

    plain, out = tmp_path / "plain", tmp_path / "out"
    checkpoints.convert(source, plain, weights="w8")
    monkeypatch.setattr(conversion, "read_folder", read)
    gc.freeze()  # collecting looks at what comes after this alone, not at all that jax and pytest hold
    checkpoints.convert(source, out, weights="w8")
    gc.unfreeze()
    assert len(held) > sum(parameter.matrix for parameter in read_folder(source).table.values())
    assert_same(contents(out), contents(plain))


KILLED = """
import os, signal, sys
from pathlib import Path
from checkpoints import conversion, groups
from tests.checkpoints.test_conversion import small_plan
conversion.plan = small_plan
write, count = conversion.write_group, 0
def write_some(*arguments):
    global count
    count += 1
    if count == 6:
        (Path(arguments[0]) / "half").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)
conversion.write_group = write_some
conversion.convert(Path(sys.argv[1]), Path(sys.argv[2]), weights=sys.argv[3])
"""


def kill_in_the_middle(source: Path, out: Path, weights: str = "w8") -> None:
    command = [sys.executable, "-c", KILLED, str(source), str(out), weights]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()


@pytest.mark.usefixtures("small_groups")
def test_a_killed_conversion_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    checkpoints.convert(source, whole, weights="w8")
    kill_in_the_middle(source, out)
    written, labels = [], []
    write = conversion.write_group
    monkeypatch.setattr(conversion, "write_group", lambda *each: (written.append(each[1]), write(*each)))
    done = checkpoints.convert(source, out, weights="w8", progress=lambda label, *_: labels.append(label))
    assert done.continued == 5
    assert written == [f"{index:04d}" for index in range(5, done.groups)]
    assert labels[0] == f"an earlier conversion left 5 of {done.groups} groups: going on from there"
    assert_same(contents(out), contents(whole))
    assert (checkpoints.verify(out), hidden(out)) == ([], [])


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("change", ["weights", "source", "group"])
def test_what_does_not_belong_together_is_not_continued(source: Path, tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    kill_in_the_middle(source, out)
    expected = 0
    if change == "source":
        os.utime(source / "model.safetensors", ns=(1, 1))
    if change == "group":  # one of the five lost a file
        next(file for file in (tmp_path / ".out.unfinished/weights/0002").rglob("*") if file.is_file()).unlink()
        expected = 4
    done = checkpoints.convert(source, out, weights="bf16" if change == "weights" else "w8")
    assert done.continued == expected
    assert checkpoints.verify(out) == []


def test_an_old_folder_stays_until_the_new_one_is_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    checkpoints.convert(source, out, weights="f32")
    monkeypatch.setattr(conversion, "write_texts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.convert(source, out, weights="w8")
    assert checkpoints.load(out).weights_format == "f32"
    monkeypatch.undo()
    assert checkpoints.convert(source, out, weights="w8").continued == 1
    assert (checkpoints.load(out).weights_format, hidden(out)) == ("w8", [])


def test_two_conversions_to_one_place(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), unfinished_folder(out, "a"):
        message = refusal(lambda: checkpoints.convert(source, out))
        assert "another conversion" in message and str(out) in message
        raise KeyboardInterrupt
    checkpoints.convert(source, out)  # the lock is gone with its holder


@pytest.mark.usefixtures("small_groups")
def test_a_full_disk_keeps_what_is_done(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write = tmp_path / "out", conversion.write_group

    def fail(store: Path, name: str, parameters: Any) -> None:
        if name == "0003":
            raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device\nmore")
        write(store, name, parameters)

    monkeypatch.setattr(conversion, "write_group", fail)
    message = refusal(lambda: checkpoints.convert(source, out))
    assert "is full" in message and ".out.unfinished" in message
    monkeypatch.setattr(conversion, "write_group", write)
    assert checkpoints.convert(source, out).continued == 3


def test_too_little_space_is_said_before_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nearly_full = type("Usage", (), {"free": 10})
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: nearly_full)
    assert "too full" in refusal(lambda: checkpoints.convert(source, tmp_path / "out"))
    assert hidden(tmp_path / "out") == []


def test_places_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(lambda: checkpoints.convert(source, tmp_path / "file" / "out"))
    assert "not a converted folder" in refusal(lambda: checkpoints.convert(source, source))

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    assert "Permission denied" in refusal(lambda: checkpoints.convert(source, tmp_path / "out"))


def test_a_damaged_source_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: Path) -> Source:
        def fail() -> np.ndarray:
            raise CheckpointError("tensor is damaged")

        opened = read_folder(path)
        return conversion.dataclasses.replace(opened, readers={**opened.readers, "final_norm": fail})

    monkeypatch.setattr(conversion, "read_folder", damaged)
    monkeypatch.setattr(conversion, "plan", small_plan)
    refusal(lambda: checkpoints.convert(source, tmp_path / "out"))
    assert (hidden(tmp_path / "out"), (tmp_path / "out").exists()) == ([], False)


@pytest.fixture
def converted(source: Path, tmp_path: Path, small_groups: None) -> Path:
    checkpoints.convert(source, tmp_path / "out", weights="w4")
    return tmp_path / "out"


def largest_file(group: Path) -> Path:
    return max((file for file in group.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def tensor_of(folder: Path, group: str) -> str:
    manifest = json.loads((folder / "weights" / "manifest.json").read_text())
    return manifest["groups"][group]["pieces"][0][0]


def test_a_flipped_bit_is_found_and_its_tensor_named(converted: Path) -> None:
    file = largest_file(converted / "weights" / "0004")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (line,) = checkpoints.verify(converted)
    assert "0004" in line and tensor_of(converted, "0004") in line and "checksum" in line


def test_a_shorter_or_missing_group_is_found_by_both(converted: Path) -> None:
    file = largest_file(converted / "weights" / "0002")
    file.write_bytes(file.read_bytes()[:-7])
    message = refusal(lambda: checkpoints.load(converted))
    assert "0002" in message and tensor_of(converted, "0002") in message and "convert the model again" in message
    shutil.rmtree(converted / "weights" / "0003")
    assert ["0002" in line or "0003" in line for line in checkpoints.verify(converted)] == [True, True]


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"key": 1, "groups": {"0000": {}}}', '{"key": "", "groups": {"0": []}}']
)
def test_a_damaged_manifest(converted: Path, content: str) -> None:
    (converted / "weights" / "manifest.json").write_text(content)
    for function in (checkpoints.load, checkpoints.verify):
        assert "manifest.json is damaged" in refusal(functools.partial(function, converted))


def test_garbage_in_place_of_a_group(converted: Path) -> None:
    file = largest_file(converted / "weights" / "0001")
    file.write_bytes(os.urandom(file.stat().st_size))
    for name in ("manifest.ocdbt", "_METADATA"):
        other = converted / "weights" / "0000" / name
        other.write_bytes(os.urandom(other.stat().st_size))
    assert "0000" in refusal(lambda: checkpoints.load(converted))


def test_a_folder_without_all_tensors(converted: Path) -> None:
    file = converted / "weights" / "manifest.json"
    manifest = json.loads(file.read_text())
    lost = manifest["groups"].pop("0000")["pieces"][0][0]
    file.write_text(json.dumps(manifest))
    assert f"lacks tensor {lost}" in refusal(lambda: checkpoints.load(converted))


def test_folders_of_the_format_before(converted: Path) -> None:
    file = converted / "config.json"
    file.write_text(file.read_text().replace("dflash-jax/2", "dflash-jax/1"))
    for function in (checkpoints.load, checkpoints.verify, checkpoints.describe):
        message = refusal(functools.partial(function, converted))
        assert "dflash-jax/1" in message and "convert the model again" in message


def test_only_converted_folders_have_checksums(source: Path) -> None:
    assert "not a converted folder" in refusal(lambda: checkpoints.verify(source))


def test_reading_is_timed(converted: Path) -> None:
    labels = []
    loaded = checkpoints.load(converted, progress=lambda label, done, total: labels.append((label, done, total)))
    assert loaded.reading is not None
    assert labels[-1] == (f"weights read: {loaded.reading}", loaded.reading.bytes, loaded.reading.bytes)
    assert [done for _, done, _ in labels] == sorted(done for _, done, _ in labels)
    assert all(isinstance(part, jax.Array) for part in jax.tree.leaves(loaded.parameters))
