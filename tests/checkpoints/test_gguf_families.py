"""GGUF files of every family: the same model as its Hugging Face folder, and the logits of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import checkpoints
import dflash_jax
from checkpoints.errors import CheckpointError
from checkpoints.gguf_source import read_gguf
from checkpoints.hf_source import read_folder
from dflash_jax.models.config import LayerConfig, ModelConfig
from pallas_kernels.quantised_matmul.api import W4, dequantise
from tests.checkpoints.gguf_writing import checked, write_gguf
from tests.checkpoints.test_gguf import METADATA, small_tensors
from tests.checkpoints.test_gguf import write as write_small

MODELS = (
    *("llama_tied", "llama_rope_scaled", "qwen2", "qwen3", "qwen3_tied"),
    *("gemma3", "gemma3_multimodal", "gemma4", "gemma4_experts", "gemma4_per_layer"),
)
Q = gguf.GGMLQuantizationType


def write(goldens: Path, name: str, file: Path, **options: Any) -> Path:
    with np.load(goldens / name / "expected.npz") as expected:
        frequencies = expected["inverse_frequencies"] if name == "llama_rope_scaled" else None
    return write_gguf(goldens / name, file, inverse_frequencies=frequencies, **options)


def rounded(config: ModelConfig) -> dict[str, Any]:
    """The record without what GGUF stores differently, floats as f32 keeps them."""
    fields = json.loads(config.to_json(), parse_float=lambda text: float(f"{float(text):.5g}"))
    return {name: value for name, value in fields.items() if name not in ("norm_offset", "stop_ids")}


@pytest.mark.parametrize("name", MODELS)
def test_same_model_as_the_folder(goldens: Path, tmp_path: Path, name: str) -> None:
    file = write(goldens, name, tmp_path / "model.gguf")
    found, expected = read_gguf(file), read_folder(goldens / name)
    assert isinstance(found.config, ModelConfig) and isinstance(expected.config, ModelConfig)
    assert rounded(found.config) == rounded(expected.config)
    assert found.config.norm_offset == 0
    assert 2 in found.config.stop_ids
    found.check()
    ones = 1 if found.config.family == "gemma3" else 0
    for tensor, reader in expected.readers.items():
        values = reader() + (ones if tensor.endswith("norm") else 0)
        np.testing.assert_allclose(found.readers[tensor](), values, rtol=1e-6, err_msg=tensor)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(goldens: Path, tmp_path: Path, name: str) -> None:
    target = dflash_jax.load_target(write(goldens, name, tmp_path / "model.gguf"))
    with np.load(goldens / name / "expected.npz") as expected:
        np.testing.assert_allclose(target.logits(expected["input_ids"]), expected["logits"], atol=5e-4, rtol=5e-4)


def test_gate_and_up_of_experts_apart(goldens: Path, tmp_path: Path) -> None:
    together = read_gguf(write(goldens, "gemma4_experts", tmp_path / "a.gguf"))
    apart = read_gguf(write(goldens, "gemma4_experts", tmp_path / "b.gguf", split_experts=True))
    apart.check()
    reader = apart.readers["layers.1.experts.gate_up"]
    expected = together.readers["layers.1.experts.gate_up"]()
    np.testing.assert_array_equal(reader(), expected)
    np.testing.assert_array_equal(checked(reader).rows(7, 60), expected[7:60])


@pytest.mark.parametrize("name", ["llama_tied", "gemma4_experts"])
def test_rows_alone_are_those_of_the_whole(goldens: Path, tmp_path: Path, name: str) -> None:
    for tensor, reader in read_gguf(write(goldens, name, tmp_path / "model.gguf")).readers.items():
        whole = reader()
        for start, stop in [(0, 1), (len(whole) // 3, len(whole) // 2 + 1), (len(whole) - 1, len(whole))]:
            np.testing.assert_array_equal(checked(reader).rows(start, stop), whole[start:stop], err_msg=tensor)


def layers(path: Path) -> tuple[LayerConfig, ...]:
    config = read_gguf(path).config
    assert isinstance(config, ModelConfig)
    return config.layers


def rewritten(file: Path, drop: tuple[str, ...] = (), tokens: int = 0, copies: tuple[str, ...] = ()) -> Path:
    """A copy of a file without the keys and tensors `drop`, with so many tokens, and ones as tensors `copies`."""
    reader = gguf.GGUFReader(str(file))
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(str(file.with_suffix(".new")), architecture)
    for key, field in reader.fields.items():
        short = key.removeprefix(f"{architecture}.")
        if not key.startswith(("GGUF.", "general.")) and short not in drop:
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    if tokens:
        writer.add_token_list([f"t{index}" for index in range(tokens)])
    for name in copies:
        writer.add_tensor(name, np.ones((2, 32), np.float32))
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.with_suffix(".new")


def test_gemma3_without_keys_for_pattern_theta_and_scale(goldens: Path, tmp_path: Path) -> None:
    keys = ("attention.sliding_window_pattern", "attention.scale", "attention.sliding_window")
    file = write(goldens, "gemma3", tmp_path / "model.gguf")
    found = layers(rewritten(file, drop=keys[:2]))
    assert [layer.window for layer in found] == [8, 8, 8]  # the first full one would be layer 5
    assert {(layer.rope.theta, layer.attention_scale) for layer in found} == {(1e4, 16**-0.5)}
    assert [layer.window for layer in layers(rewritten(file, drop=keys))] == [None] * 3


def test_linear_scaling_of_gemma3_is_on_full_layers_only(goldens: Path, tmp_path: Path) -> None:
    found = layers(write(goldens, "gemma3_multimodal", tmp_path / "model.gguf"))
    assert [(layer.window, layer.rope.linear_factor) for layer in found] == [(8, 1.0), (None, 8.0), (8, 1.0)]


def test_one_projection_for_k_and_v_shows_in_a_missing_tensor(goldens: Path, tmp_path: Path) -> None:
    found = layers(write(goldens, "gemma4", tmp_path / "a.gguf"))
    assert [layer.values_are_keys for layer in found] == [False, True, False, True]
    file = write(goldens, "gemma4_per_layer", tmp_path / "b.gguf")
    assert not any(layer.values_are_keys for layer in layers(file))
    with pytest.raises(CheckpointError, match=r"blk\.3\.attn_v\.weight is missing in one full layer"):
        read_gguf(rewritten(file, drop=("blk.3.attn_v.weight",)))


def test_copies_of_shared_layers_are_skipped(goldens: Path, tmp_path: Path) -> None:
    copies = ("blk.5.attn_k.weight", "blk.4.attn_v.weight")
    source = read_gguf(rewritten(write(goldens, "gemma4_per_layer", tmp_path / "model.gguf"), copies=copies))
    source.check()
    assert set(source.skipped) == set(copies)


def test_more_tokens_than_rows(goldens: Path, tmp_path: Path) -> None:
    file = write(goldens, "qwen3", tmp_path / "model.gguf")
    assert read_gguf(rewritten(file, tokens=90)).config.vocab_size == 96
    with pytest.raises(CheckpointError, match=r"the tokenizer has 97 ids, tensor token_embd\.weight 96 rows"):
        read_gguf(rewritten(file, tokens=97))


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random bytes, with scales that are ordinary numbers: no package here writes K-quants."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    content = np.random.default_rng(int(kind)).integers(0, 256, (rows, columns // block, size), np.uint8)
    halves = {Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)}
    halves |= {Q.Q4_1: (0, 2), Q.Q5_1: (0, 2)}
    for place in halves.get(kind, (0,)):
        scale = np.random.default_rng(place).uniform(0.01, 0.1, content.shape[:2]).astype(np.float16)
        content[:, :, place : place + 2] = scale[..., None].view(np.uint8)
    return content.reshape(rows, -1)


@pytest.mark.parametrize(
    "kind",
    [Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_NL, Q.IQ4_XS],
    ids=lambda kind: kind.name,
)
def test_blocks_of_every_type(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    written = small_tensors()
    content = random_blocks(kind, 8, 256)
    writer_metadata = {**METADATA, "feed_forward_length": 256}
    for index in range(2):
        for part in ("gate", "up"):
            written[f"blk.{index}.ffn_{part}.weight"] = np.zeros((256, 8), np.float32)
        written[f"blk.{index}.ffn_down.weight"] = np.zeros((8, 256), np.float32)
    file = write_small(tmp_path / "a.gguf", written, writer_metadata, raw={"blk.1.ffn_down.weight": (content, kind)})
    reader = read_gguf(file).readers["layers.1.mlp.down"]
    expected = gguf.dequantize(content, kind)
    assert np.isfinite(expected).all() and expected.std() > 0
    np.testing.assert_array_equal(reader(), expected)
    np.testing.assert_array_equal(checked(reader).rows(3, 5), expected[3:5])


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0], ids=lambda kind: kind.name)
def test_types_of_real_files(goldens: Path, tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Matrices in `kind`, norms in F32, as files of llama.cpp have it."""

    def choose(name: str, values: np.ndarray) -> gguf.GGMLQuantizationType:
        return kind if values.ndim > 1 and values.shape[-1] % 32 == 0 else Q.F32

    file = write(goldens, "gemma4_experts", tmp_path / "model.gguf", kind=choose)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    tensor = stored["blk.2.ffn_gate_up_exps.weight"]
    assert tensor.tensor_type == kind
    expected = gguf.dequantize(tensor.data, kind).reshape(-1, 32)
    np.testing.assert_array_equal(read_gguf(file).readers["layers.2.experts.gate_up"](), expected)


@pytest.mark.parametrize(("kind", "name"), [(Q.TQ1_0, "TQ1_0"), (Q.I32, "I32"), (Q.IQ2_XXS, "IQ2_XXS")])
def test_type_that_is_not_supported(tmp_path: Path, kind: gguf.GGMLQuantizationType, name: str) -> None:
    file = write_small(tmp_path / "a.gguf", small_tensors(), raw={"x.weight": (random_blocks(kind, 2, 256), kind)})
    with pytest.raises(CheckpointError, match=rf"'x\.weight' has type {name}, which is not supported; supported: F32"):
        read_gguf(file)


def test_describe(goldens: Path, tmp_path: Path) -> None:
    description = checkpoints.describe(write(goldens, "gemma4_experts", tmp_path / "model.gguf"))
    assert (description["family"], description["layers"]) == ("gemma4", 4)


def test_q4_0_goes_into_w4_without_loss(tmp_path: Path) -> None:
    """Any blocks: every float16 can be a scale, and llama.cpp is not the only program that writes them."""
    written = small_tensors()
    for index in range(2):
        for part in ("gate", "up"):
            written[f"blk.{index}.ffn_{part}.weight"] = np.zeros((256, 8), np.float32)
        written[f"blk.{index}.ffn_down.weight"] = np.zeros((8, 256), np.float32)
    name, metadata = "blk.1.ffn_down.weight", {**METADATA, "feed_forward_length": 256}
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, 256, (8, 8, 18), np.uint8)
    scales = generator.integers(0, 0x7C00, (8, 8)).astype(np.uint16).view(np.float16)
    blocks[:, :, :2] = scales[..., None].view(np.uint8)
    blocks[4, :, 2:] = 0x79  # of 16 steps these need two only
    blocks = blocks.reshape(8, -1)
    loaded = checkpoints.load(
        write_small(tmp_path / "a.gguf", written, metadata, raw={name: (blocks, Q.Q4_0)}), weights="w4"
    )
    weight = loaded.parameters["layers.1.mlp.down"]
    assert isinstance(weight, W4)
    np.testing.assert_array_equal(np.asarray(dequantise(weight, 256)), gguf.dequantize(blocks, Q.Q4_0))
