"""4-bit and 8-bit Hugging Face folders. The packing is written here from the published layouts: AutoGPTQ's and
GPTQModel's QuantLinear.pack, AutoAWQ's WQLinear_GEMM.from_linear, and compressed-tensors' pack_to_int32.
"""

from __future__ import annotations

import json
import shutil
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
from checkpoints.errors import CheckpointError
from checkpoints.hf_source import read_folder
from tests.checkpoints.gguf_writing import checked

GROUP = 8
Tensors = dict[str, np.ndarray]
Packed = tuple[Tensors, np.ndarray]
"""The tensors of a module without its prefix, and the f32 matrix that they stand for."""


def quantised(weight: np.ndarray, bits: int, seed: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random values, zeros and scales of the size of a weight; what they are worth is what is compared."""
    generator = np.random.default_rng(seed)
    rows, columns = weight.shape
    values = generator.integers(0, 1 << bits, (rows, columns))
    zeros = generator.integers(1, 1 << bits, (rows, groups))
    scales = generator.uniform(0.5, 1.5, (rows, groups)).astype(np.float16) / np.float16(1 << bits)
    return values, zeros, scales


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Along the last axis, one value after the other from the lowest bits up."""
    count = 32 // bits
    padded = np.pad(values, [(0, 0), (0, -values.shape[1] % count)]).astype(np.uint32)
    words = np.zeros((len(values), padded.shape[1] // count), np.uint32)
    for place in range(count):
        words |= padded[:, place::count] << np.uint32(bits * place)
    return words.view(np.int32)


def matrix(values: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """Entry by entry in f64."""
    result = np.empty(values.shape, np.float64)
    for row, column in np.ndindex(*values.shape):
        group = group_of[column]
        result[row, column] = (int(values[row, column]) - int(zeros[row, group])) * float(scales[row, group])
    return result.astype(np.float32)


def gptq(bits: int = 4, version: int = 1, order: bool = False) -> Callable[[np.ndarray, int], Packed]:
    def pack(weight: np.ndarray, seed: int) -> Packed:
        columns = weight.shape[1]
        group_of = np.arange(columns) // GROUP
        if order:
            group_of = np.random.default_rng(seed).permutation(group_of)
        values, zeros, scales = quantised(weight, bits, seed, columns // GROUP)
        tensors = {
            "qweight": np.ascontiguousarray(packed(values, bits).T),
            "qzeros": packed((zeros - (version == 1)).T, bits),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": group_of.astype(np.int32),
            "bias": np.zeros(len(weight), np.float16),
        }
        return tensors, matrix(values, zeros, scales, group_of)

    return pack


def awq(weight: np.ndarray, seed: int) -> Packed:
    columns = weight.shape[1]
    values, zeros, scales = quantised(weight, 4, seed, columns // GROUP)

    def shuffled(of: np.ndarray) -> np.ndarray:
        words = np.zeros((len(of), of.shape[1] // 8), np.uint32)
        for word in range(words.shape[1]):
            for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, word] |= of[:, word * 8 + column].astype(np.uint32) << np.uint32(4 * place)
        return words.view(np.int32)

    tensors = {"qweight": shuffled(values.T), "qzeros": shuffled(zeros.T), "scales": np.ascontiguousarray(scales.T)}
    return tensors, matrix(values, zeros, scales, np.arange(columns) // GROUP)


def compressed(
    bits: int = 4, symmetric: bool = True, order: bool = False, group: int = GROUP
) -> Callable[[np.ndarray, int], Packed]:
    def pack(weight: np.ndarray, seed: int) -> Packed:
        columns, middle = weight.shape[1], 1 << (bits - 1)
        size = min(group, columns)
        group_of = np.arange(columns) // size
        if order:
            group_of = np.random.default_rng(seed).permutation(group_of)
        values, zeros, scales = quantised(weight, bits, seed, columns // size)
        scales = scales.astype(ml_dtypes.bfloat16)
        zeros = np.full_like(zeros, middle) if symmetric else zeros
        tensors = {
            "weight_packed": packed(values, bits),
            "weight_scale": scales,
            "weight_shape": np.array(weight.shape, np.int64),
        }
        if not symmetric:
            tensors["weight_zero_point"] = np.ascontiguousarray(packed(np.ascontiguousarray(zeros.T), bits).T)
        if order:
            tensors["weight_g_idx"] = group_of.astype(np.int32)
        return tensors, matrix(values, zeros, scales, group_of)

    return pack


def eight_bits(dtype: Any, scales: str) -> Callable[[np.ndarray, int], Packed]:
    def pack(weight: np.ndarray, seed: int) -> Packed:
        generator = np.random.default_rng(seed)
        rows, columns = weight.shape
        values = generator.integers(-100, 100, weight.shape).astype(np.int8 if dtype is np.int8 else np.float32)
        values = values.astype(dtype)
        shape = {"channel": (rows, 1), "tensor": (1,), "block": (-(-rows // 8), -(-columns // 16))}[scales]
        scale = generator.uniform(0.001, 0.002, shape).astype(ml_dtypes.bfloat16)
        wide = scale.astype(np.float32)
        if scales == "block":
            wide = np.repeat(np.repeat(wide, 8, axis=0), 16, axis=1)[:rows, :columns]
        tensors = {"weight": values, "weight_scale": scale, "input_scale": np.ones(1, np.float32)}
        return tensors, values.astype(np.float32) * wide

    return pack


def compressed_config(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", **weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
PACK, INT, FLOAT = (compressed_config(f"{name}-quantized") for name in ("pack", "int", "float"))
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
LAYOUTS = {
    "gptq": (GPTQ, gptq()),
    "gptq_v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(version=2)),
    "gptq_8_bits": ({**GPTQ, "bits": 8}, gptq(bits=8)),
    "gptq_act_order": ({**GPTQ, "desc_act": True}, gptq(order=True)),
    "awq": (AWQ, awq),
    "compressed_symmetric": (PACK, compressed()),
    "compressed_asymmetric": (PACK, compressed(symmetric=False)),
    "compressed_8_bits": (PACK, compressed(bits=8, symmetric=False)),
    "compressed_act_order": (PACK, compressed(order=True)),
    "compressed_channel": (PACK, compressed(group=1 << 20)),
    "int8_channel": (INT, eight_bits(np.int8, "channel")),
    "fp8_channel": (FLOAT, eight_bits(ml_dtypes.float8_e4m3fn, "channel")),
    "fp8_tensor": (FLOAT, eight_bits(ml_dtypes.float8_e4m3fn, "tensor")),
    "fp8_block": (
        compressed_config("float-quantized", strategy="block", block_structure=[8, 16]),
        eight_bits(ml_dtypes.float8_e4m3fn, "block"),
    ),
}


def write_pair(goldens: Path, folder: Path, layout: str, name: str = "qwen3") -> tuple[Path, Path]:
    """A quantised folder, and the plain f32 one of the same numbers."""
    config, pack = LAYOUTS[layout]
    plain, quant = {}, {}
    for index, (tensor, values) in enumerate(load_file(goldens / name / "model.safetensors").items()):
        if tensor.endswith("_proj.weight"):
            parts, plain[tensor] = pack(values, index)
            quant |= {f"{tensor.removesuffix('.weight')}.{part}": each for part, each in parts.items()}
        else:
            plain[tensor] = quant[tensor] = values
    described = json.loads((goldens / name / "config.json").read_text(encoding="utf-8"))
    for label, tensors, more in (("plain", plain, {}), ("quant", quant, {"quantization_config": config})):
        (folder / label).mkdir()
        save_file(tensors, folder / label / "model.safetensors")
        (folder / label / "config.json").write_text(json.dumps({**described, **more}), encoding="utf-8")
    return folder / "quant", folder / "plain"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_those_of_the_layout(goldens: Path, tmp_path: Path, layout: str) -> None:
    quant, plain = (read_folder(folder) for folder in write_pair(goldens, tmp_path, layout))
    quant.check()
    assert quant.config == plain.config
    for name, reader in plain.readers.items():
        found, expected = quant.readers[name](), reader()
        np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-9, err_msg=name)
        part = checked(quant.readers[name]).rows(3, 12)
        np.testing.assert_array_equal(part, found[3:12], err_msg=name)


@pytest.mark.parametrize("layout", ["gptq_act_order", "awq", "compressed_asymmetric"])
def test_logits(goldens: Path, tmp_path: Path, layout: str) -> None:
    quant, plain = (dflash_jax.load_target(folder) for folder in write_pair(goldens, tmp_path, layout))
    ids = jnp.arange(24).reshape(2, 12)
    np.testing.assert_allclose(quant.logits(ids), plain.logits(ids), atol=1e-4, rtol=1e-4)


def test_what_nobody_reads_is_listed(goldens: Path, tmp_path: Path) -> None:
    gptq_folder = tmp_path / "a"
    gptq_folder.mkdir()
    quant, _ = write_pair(goldens, gptq_folder, "gptq")
    assert "model.layers.0.self_attn.q_proj.bias" in read_folder(quant).skipped
    fp8_folder = tmp_path / "b"
    fp8_folder.mkdir()
    quant, _ = write_pair(goldens, fp8_folder, "fp8_channel")
    assert "model.layers.0.self_attn.q_proj.input_scale" in read_folder(quant).skipped


@pytest.mark.parametrize(
    ("layout", "change", "found"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported; supported: gptq, awq, compressed"),
        ("gptq", {"quant_method": None}, "quantisation method None is not supported"),
        ("gptq", {"quant_method": ["gptq"]}, "is not supported"),
        ("gptq", {"bits": 3}, "GPTQ with 3 bits is not supported; supported: 4, 8"),
        ("gptq", {"bits": 8}, "do not belong together"),
        ("awq", {"group_size": 16}, "has 7 groups for 56 inputs in groups of 16"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin' is not supported; supported: gptq, gptq_v2"),
        ("awq", {"version": "gemv"}, "AWQ 'gemv' with 4 bits is not supported"),
        ("compressed_symmetric", {"format": "marlin-24"}, "'marlin-24' is not supported; supported: pack-quantized"),
        ("compressed_symmetric", {"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized' is not supported"),
        ("compressed_symmetric", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
        ("compressed_symmetric", {"config_groups": [1]}, "damaged or unusual"),
    ],
)
def test_refused_by_name(goldens: Path, tmp_path: Path, layout: str, change: dict[str, Any], found: str) -> None:
    quant, _ = write_pair(goldens, tmp_path, layout)
    config = json.loads((quant / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= change
    (quant / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(quant)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "part"), [("gptq", "qzeros"), ("awq", "scales"), ("compressed_symmetric", "weight_shape")]
)
def test_part_that_is_missing(goldens: Path, tmp_path: Path, layout: str, part: str) -> None:
    quant, _ = write_pair(goldens, tmp_path, layout)
    tensors = load_file(quant / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, quant / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.mlp\.up_proj\.{part} is missing"):
        read_folder(quant)


def test_group_that_does_not_exist(goldens: Path, tmp_path: Path) -> None:
    quant, _ = write_pair(goldens, tmp_path, "gptq_act_order")
    tensors = load_file(quant / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"][3] = 4
    save_file(tensors, quant / "model.safetensors")
    with pytest.raises(CheckpointError, match="names group 4 of 4"):
        read_folder(quant)


def test_quantised_tensors_without_a_config(goldens: Path, tmp_path: Path) -> None:
    quant, plain = write_pair(goldens, tmp_path, "gptq")
    shutil.copy(plain / "config.json", quant / "config.json")
    with pytest.raises(CheckpointError, match="has dtype I32; supported: F32, F16, BF16, and quantised ones"):
        read_folder(quant)
