"""Damaged headers end in CheckpointError or ConfigError, and nobody allocates what a header merely claims."""

from __future__ import annotations

import json
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoints
from checkpoints.gguf_source import read_gguf
from checkpoints.hf_source import read_folder
from checkpoints.readers import CheckpointWarning
from checkpoints.source import Source
from dflash_jax.models.config import ConfigError
from tests.checkpoints.gguf_writing import write_gguf

pytestmark = pytest.mark.slow

EDGES = [0, 1, 2, 31, 255, 1 << 16, (1 << 31) - 1, (1 << 32) - 1, 1 << 40, (1 << 62) + 1, (1 << 64) - 1]
MOST = 16 << 20
"""Bytes that reading a file of 100 KB may allocate."""

changes = st.one_of(
    st.tuples(st.just("byte"), st.integers(0, 1 << 20), st.integers(0, 255)),
    st.tuples(st.just("u32"), st.integers(0, 1 << 20), st.sampled_from(EDGES)),
    st.tuples(st.just("u64"), st.integers(0, 1 << 20), st.sampled_from(EDGES)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 20), st.just(0)),
    st.tuples(st.just("repeat"), st.integers(0, 1 << 20), st.integers(1, 64)),
    st.tuples(st.just("drop"), st.integers(0, 1 << 20), st.integers(1, 64)),
)


def changed(content: bytes, edits: list[tuple[str, int, int]], header: int) -> bytes:
    """The file with edits at places in its header."""
    result = bytearray(content)
    for kind, anywhere, value in edits:
        place = anywhere % header
        if kind == "byte":
            result[place : place + 1] = bytes([value])
        elif kind == "u32":
            result[place : place + 4] = struct.pack("<I", value & 0xFFFFFFFF)
        elif kind == "u64":
            result[place : place + 8] = struct.pack("<Q", value)
        elif kind == "cut":
            del result[place:]
        elif kind == "repeat":
            result[place:place] = result[place : place + value]
        else:
            del result[place : place + value]
    return bytes(result)


def survives(read: Callable[[Path], Source], path: Path) -> None:
    """Reads what can be read. Any other exception than ours, and memory out of proportion, is a failure."""
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            source = read(path)
            source.check()
            for reader in source.readers.values():
                reader()
    except (checkpoints.CheckpointError, ConfigError) as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST


@pytest.fixture(scope="module")
def gguf_files(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("gguf")
    models = ("llama_tied", "gemma3", "gemma4_experts", "gemma4_per_layer")
    return [write_gguf(goldens / name, folder / f"{name}.gguf").read_bytes() for name in models]


OPTIONS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
FEW, MANY = settings(max_examples=100, **OPTIONS), settings(max_examples=400, **OPTIONS)


@MANY
@given(which=st.integers(0, 3), edits=st.lists(changes, min_size=1, max_size=4))
def test_gguf(gguf_files: list[bytes], tmp_path: Path, which: int, edits: list[tuple[str, int, int]]) -> None:
    content = gguf_files[which]
    file = tmp_path / "model.gguf"
    file.write_bytes(changed(content, edits, content.index(b"rope_freqs") if b"rope_freqs" in content else 3000))
    survives(read_gguf, file)


@pytest.mark.parametrize(("character", "shown"), [(b"\n", ""), (b"\x07", r"\x07")])
def test_names_that_cannot_be_printed_stand_in_one_line(
    gguf_files: list[bytes], tmp_path: Path, character: bytes, shown: str
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf_files[0].replace(b"blk.2.ffn_gate", character + b"lk.2.ffn_gate"))
    with pytest.raises(checkpoints.CheckpointError) as caught:
        read_gguf(file)
    assert f"tensor {shown}lk.2.ffn_gate.weight is unknown" in str(caught.value)


@MANY
@given(edits=st.lists(changes, min_size=1, max_size=4), name=st.sampled_from(["qwen3_tied", "gemma3_multimodal"]))
def test_safetensors(goldens: Path, tmp_path: Path, edits: list[tuple[str, int, int]], name: str) -> None:
    content = (goldens / name / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((goldens / name / "config.json").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(changed(content, edits, header))
    survives(read_folder, tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gemma4", "drafter_full"])
def test_count_of_layers(goldens: Path, tmp_path: Path, name: str) -> None:
    described = json.loads((goldens / name / "config.json").read_text(encoding="utf-8"))
    described = {**described, "num_hidden_layers": 1 << 40, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(described), encoding="utf-8")
    survives(read_folder, tmp_path)


any_json = st.recursive(
    st.none() | st.booleans() | st.sampled_from([0, 1, -1, 7, 1 << 40, 0.5, 1e400, "", "silu", "full_attention"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "rope_type"]), inner, max_size=2),
    max_leaves=4,
)


@FEW
@given(data=st.data(), name=st.sampled_from(["qwen2", "gemma3_multimodal", "gemma4_per_layer", "drafter_sliding"]))
def test_config(goldens: Path, tmp_path: Path, data: st.DataObject, name: str) -> None:
    described = json.loads((goldens / name / "config.json").read_text(encoding="utf-8"))
    fields = described.get("text_config", described)
    for key in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3)):
        fields[key] = data.draw(any_json)
    (tmp_path / "config.json").write_text(json.dumps(described), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((goldens / name / "model.safetensors").read_bytes())
    survives(read_folder, tmp_path)
