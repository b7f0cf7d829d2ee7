"""Hugging Face folders: shards, other modalities, and everything that can be wrong in one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
from checkpoints.errors import CheckpointError
from checkpoints.hf_source import read_folder
from checkpoints.readers import CheckpointWarning
from tests.checkpoints.gguf_writing import checked


@pytest.fixture
def folder(goldens: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(goldens / "qwen3", copy)
    return copy


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


def write_raw(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def sharded(folder: Path, dtype: Any = np.float32) -> list[Path]:
    """Two files and an index in place of one file."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    files, places = [], {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        files.append(folder / f"model-0000{number}-of-00002.safetensors")
        save_file({name: tensors[name].astype(dtype) for name in part}, files[-1])
        places |= dict.fromkeys(part, files[-1].name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return files


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_shards_of_every_dtype(goldens: Path, folder: Path, dtype: Any) -> None:
    sharded(folder, dtype)
    found, expected = checkpoints.load(folder), checkpoints.load(goldens / "qwen3")
    for name, values in expected.parameters.items():
        rounded = np.asarray(values).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(found.parameters[name]), rounded, err_msg=name)


def test_rows_alone(goldens: Path) -> None:
    for name, reader in read_folder(goldens / "gemma4_experts").readers.items():
        whole = reader()
        np.testing.assert_array_equal(checked(reader).rows(1, 31), whole[1:31], err_msg=name)


def test_other_modalities_are_listed(goldens: Path) -> None:
    skipped = read_folder(goldens / "gemma3_multimodal").skipped
    assert skipped and all("vision" in name or "multi_modal" in name for name in skipped)
    assert checkpoints.describe(goldens / "gemma3_multimodal")["skipped"] == list(skipped)


def test_missing_shard(folder: Path) -> None:
    sharded(folder)[1].unlink()
    assert "model-00002-of-00002.safetensors, named in model.safetensors.index.json, is missing" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.999])
def test_truncated(folder: Path, kept: float) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept if kept >= 1 else len(content) * kept)])
    assert "damaged or truncated" in refusal(folder)


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **changes}


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ((1 << 60).to_bytes(8, "little"), "its header claims"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "tensors 'a' and 'b' overlap"),
        ({"a": entry(0, 4000)}, "ends at byte 4000 of 16"),
        ({"a": entry(0, 8, shape=[1 << 62])}, "has 8 bytes for shape"),
        ({"a": entry(0, 8, shape=[True, 2])}, "has no shape or no place"),
        ({"a": entry(0, 8, shape=[-1, -2])}, "has no shape or no place"),
        ({"a": entry(8, 0, shape=[2])}, "has -8 bytes for shape [2]"),
        ({"a": entry(0, 8, data_offsets=[0])}, "has no shape or no place"),
        ({"a": entry(0, 8, dtype="F4")}, "has dtype 'F4'; supported: F64, F32"),
        ({"a": 3}, "has no shape or no place"),
        (b'{"a": 1, "a": 2}', "a name appears twice"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "is not a JSON object"),
    ],
)
def test_damaged_header(folder: Path, header: Any, found: str) -> None:
    file = folder / "model.safetensors"
    if isinstance(header, bytes) and len(header) == 8:
        file.write_bytes(header + b"{}")
    else:
        write_raw(file, header, bytes(16))
    assert found in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_named(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(CheckpointWarning, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        loaded = checkpoints.load(folder)
    assert not np.isfinite(np.asarray(loaded.parameters["layers.1.mlp.up"])).all()


def tokenizer(ids: int, added: int = 0) -> str:
    vocabulary = {f"t{index}": index for index in range(ids)}
    extra = [{"id": ids + index, "content": f"a{index}"} for index in range(added)]
    return json.dumps({"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": extra})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (tokenizer(90, 6), None),
        (tokenizer(97), "the tokenizer has id 96, the model 96 rows"),
        (tokenizer(90, 7), "the tokenizer has id 96, the model 96 rows"),
        (json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]] * 97}}), "the tokenizer has id 96"),
        ("{", "tokenizer.json is damaged"),
        ("[]", "tokenizer.json is damaged"),
        (json.dumps({"added_tokens": [3]}), "tokenizer.json is damaged"),
    ],
)
def test_tokenizer_and_vocabulary(folder: Path, text: str, found: str | None) -> None:
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if found is None:
        assert read_folder(folder).tokenizer_json == text
    else:
        assert found in refusal(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_token_ids_that_are_none_are_named(folder: Path, file: str) -> None:
    described = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**described, "eos_token_id": "a"}))
    with pytest.raises(CheckpointError, match=f"{file}.*: eos_token_id is 'a', expected a token id"):
        read_folder(folder)


def test_tensor_without_a_place(folder: Path) -> None:
    tensors = {**load_file(folder / "model.safetensors"), "model.surprise.weight": np.ones(3, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    assert "tensor model.surprise.weight is unknown in a qwen3 model" in refusal(folder)


def test_single_number(folder: Path) -> None:
    tensors = {**load_file(folder / "model.safetensors"), "model.norm.weight": np.float32(1)}
    save_file({name: np.asarray(values) for name, values in tensors.items()}, folder / "model.safetensors")
    assert "tensor model.norm.weight is a single number" in refusal(folder)
