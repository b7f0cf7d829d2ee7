"""Experts one by one, plain and packed, and packed tensors of all experts: the same model as with two plain tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
import dflash_jax
from checkpoints import conversion, groups, packed_weights
from checkpoints.errors import CheckpointError
from checkpoints.hf_source import read_folder
from pallas_kernels.quantised_matmul.api import dequantise
from tests.checkpoints.gguf_writing import checked
from tests.checkpoints.test_packed_weights import FLOAT, PACK, Packed, Tensors, compressed, eight_bits

pytestmark = pytest.mark.slow

Pack = Callable[[np.ndarray, int], Packed]


def as_is(weight: np.ndarray, seed: int) -> Packed:
    del seed
    rounded = weight.astype(ml_dtypes.bfloat16)
    return {"weight": rounded}, rounded.astype(np.float32)


def one_by_one(pack: Pack, prefix: str = "", fused: bool = False) -> Callable[[str, np.ndarray], Packed]:
    """Stores `experts.gate_up_proj` or `experts.down_proj` as linear maps of single experts."""

    def store(name: str, values: np.ndarray) -> Packed:
        module, _, last = name.rpartition(".")
        start = module.removesuffix("experts") + prefix + "experts"
        parts = {"gate_proj": values[:, : values.shape[1] // 2], "up_proj": values[:, values.shape[1] // 2 :]}
        if last == "down_proj" or fused:
            parts = {last: values}
        stored, whole = {}, []
        for number in range(len(values)):
            for index, (part, matrices) in enumerate(parts.items()):
                tensors, matrix = pack(matrices[number], 7 * number + index)
                stored |= {f"{start}.{number}.{part}.{each}": array for each, array in tensors.items()}
                whole.append(matrix)
        return stored, np.concatenate(whole).reshape(values.shape)

    return store


def in_one(symmetric: bool) -> Callable[[str, np.ndarray], Packed]:
    """Stores packed words of all experts; 12 inputs, which make no whole words, stay plain."""

    def store(name: str, values: np.ndarray) -> Packed:
        if values.shape[-1] % 8:
            return {name: values}, values
        found = [compressed(symmetric=symmetric)(matrix, seed) for seed, matrix in enumerate(values)]
        names = {"weight_packed": "packed", "weight_scale": "scale", "weight_zero_point": "zero_point"}
        stored = {
            f"{name}_{short}": np.stack([tensors[part] for tensors, _ in found])
            for part, short in names.items()
            if part in found[0][0]
        }
        return stored, np.stack([matrix for _, matrix in found])

    return store


LAYOUTS: dict[str, tuple[dict[str, Any] | None, Callable[[str, np.ndarray], Packed]]] = {
    "bf16": (None, one_by_one(as_is)),
    "bf16, gate and up together": (None, one_by_one(as_is, fused=True)),
    "bf16 in moe": (None, one_by_one(as_is, prefix="moe.")),
    "packed": (PACK, one_by_one(compressed(group=4))),
    "packed, asymmetric": (PACK, one_by_one(compressed(group=4, symmetric=False))),
    "fp8": (FLOAT, one_by_one(eight_bits(ml_dtypes.float8_e4m3fn, "channel"))),
    "packed in one": (PACK, in_one(symmetric=True)),
    "packed in one, asymmetric": (PACK, in_one(symmetric=False)),
}


def write_pair(goldens: Path, folder: Path, layout: str) -> tuple[Path, Path]:
    """The experts of a tiny model as `layout` stores them, and a folder with two plain tensors of the same numbers."""
    config, store = LAYOUTS[layout]
    described = json.loads((goldens / "gemma4_experts" / "config.json").read_text(encoding="utf-8"))
    stored, plain = {}, {}
    for name, values in load_file(goldens / "gemma4_experts" / "model.safetensors").items():
        if ".experts." in name:
            tensors, plain[name] = store(name, values)
            stored |= tensors
        else:
            stored[name] = plain[name] = values
    quantisation = {"quantization_config": config} if config else {}
    write(folder / "stored", stored, {**described, **quantisation})
    write(folder / "plain", plain, described)
    return folder / "stored", folder / "plain"


def write(folder: Path, tensors: Tensors, described: dict[str, Any]) -> None:
    folder.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_those_of_the_layout(goldens: Path, tmp_path: Path, layout: str) -> None:
    stored, plain = (read_folder(folder) for folder in write_pair(goldens, tmp_path, layout))
    stored.check()
    assert {name for name in stored.skipped if not name.endswith("input_scale")} == set(plain.skipped)
    for name in ("layers.0.experts.gate_up", "layers.1.experts.down"):
        found, expected = stored.readers[name](), plain.readers[name]()
        np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-9, err_msg=name)
        for start, stop in [(0, 1), (5, 70), (11, 13), (24, 48), (len(found) - 1, len(found))]:
            np.testing.assert_array_equal(checked(stored.readers[name]).rows(start, stop), found[start:stop])


@pytest.mark.parametrize("layout", ["bf16", "packed", "packed in one"])
def test_logits(goldens: Path, tmp_path: Path, layout: str) -> None:
    stored, plain = (dflash_jax.load_target(folder) for folder in write_pair(goldens, tmp_path, layout))
    ids = jnp.arange(24).reshape(2, 12)
    np.testing.assert_allclose(stored.logits(ids), plain.logits(ids), atol=1e-4, rtol=1e-4)


def test_a_piece_reads_its_own_experts_only(goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a conversion holds a piece, however many experts stand below each other."""
    stored, _ = write_pair(goldens, tmp_path, "packed")
    unpacked = []
    dequantise_rows = packed_weights._dequantise

    def counted(values: np.ndarray, *arguments: Any) -> np.ndarray:
        unpacked.append(len(values))
        return dequantise_rows(values, *arguments)

    monkeypatch.setattr(packed_weights, "_dequantise", counted)
    checked(read_folder(stored).readers["layers.1.experts.gate_up"]).rows(30, 50)
    assert unpacked == [6, 12, 2]


def test_conversion_in_pieces(goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, plain = write_pair(goldens, tmp_path, "packed")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "plan", lambda table: groups.plan(table, 8000))
        checkpoints.convert(stored, tmp_path / "out", weights="f32")
    found, expected = checkpoints.load(tmp_path / "out").parameters, checkpoints.load(plain).parameters
    for name, weight in expected.items():
        np.testing.assert_allclose(dequantise(found[name]), dequantise(weight), rtol=3e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tensors, name: tensors.pop(name), r"experts\.3\.up_proj\.weight is missing"),
        (lambda tensors, name: tensors.update({name: tensors[name][:4]}), r"experts\.3\.up_proj\.weight has shape"),
        (
            lambda tensors, name: [tensors.pop(each) for each in list(tensors) if "experts.7." in each],
            r"experts\.N\.gate_proj and up_proj has shape \[168, 32\], the config asks for \[192, 32\]",
        ),
    ],
    ids=["missing", "of another shape", "fewer experts"],
)
def test_experts_that_do_not_fit(
    goldens: Path, tmp_path: Path, change: Callable[[Tensors, str], Any], found: str
) -> None:
    stored, _ = write_pair(goldens, tmp_path, "bf16")
    tensors = load_file(stored / "model.safetensors")
    change(tensors, "model.language_model.layers.0.experts.3.up_proj.weight")
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(CheckpointError, match=found):
        checkpoints.load(stored)


def test_bits_that_packed_experts_do_not_come_in(goldens: Path, tmp_path: Path) -> None:
    stored, _ = write_pair(goldens, tmp_path, "packed in one")
    described = json.loads((stored / "config.json").read_text(encoding="utf-8"))
    described["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    (stored / "config.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"compressed-tensors with \[3\] bits is not supported") as caught:
        read_folder(stored)
    assert str(stored) in str(caught.value)
