"""Drafters in every published layout: z-lab's, "speculators", llama.cpp's GGUF and that of its forks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
from checkpoints.errors import CheckpointError
from checkpoints.gguf_source import read_gguf
from checkpoints.hf_source import read_folder
from checkpoints.hf_writer import write_drafter
from checkpoints.readers import CheckpointWarning
from dflash_jax.engine.loading import load_model
from dflash_jax.models.config import DrafterConfig
from pallas_kernels.quantised_matmul.api import W4, W8

NAME = "drafter_sliding"


def described(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / NAME / "config.json").read_text(encoding="utf-8"))


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


def speculators(goldens: Path, **changes: Any) -> dict[str, Any]:
    """The fields of speculators/models/dflash/config.py."""
    plain = described(goldens)
    options = plain.pop("dflash_config")
    block_size = plain.pop("block_size")
    del plain["num_target_layers"]
    return {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "transformer_layer_config": plain,
        "draft_vocab_size": plain["vocab_size"],
        "block_size": block_size,
        "aux_hidden_state_layer_ids": [id + 1 for id in options["target_layer_ids"]],
        "mask_token_id": options["mask_token_id"],
        "projector_type": "dflash",
        "sliding_window_non_causal": False,
        "sample_from_anchor": False,
        **changes,
    }


def write_gguf(goldens: Path, file: Path, architecture: str, **extra: np.ndarray) -> Path:
    """As conversion/qwen.py of llama.cpp writes a drafter, or as files for its forks are."""
    plain, forked = described(goldens), architecture != "dflash"
    options = plain["dflash_config"]
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_block_count(plain["num_hidden_layers"])
    writer.add_embedding_length(plain["hidden_size"])
    writer.add_feed_forward_length(plain["intermediate_size"])
    writer.add_head_count(plain["num_attention_heads"])
    writer.add_head_count_kv(plain["num_key_value_heads"])
    writer.add_key_length(plain["head_dim"])
    writer.add_layer_norm_rms_eps(plain["rms_norm_eps"])
    writer.add_rope_freq_base(plain["rope_parameters"]["rope_theta"])
    writer.add_sliding_window(plain["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in plain["layer_types"]])
    if forked:
        writer.add_vocab_size(plain["vocab_size"])
        writer.add_array(f"{architecture}.dflash.target_layer_ids", options["target_layer_ids"])
        writer.add_uint32(f"{architecture}.dflash.mask_token_id", options["mask_token_id"])
        writer.add_uint32(f"{architecture}.dflash.block_size", plain["block_size"])
    else:
        writer.add_token_list([f"t{index}" for index in range(plain["vocab_size"])])
        writer.add_array("dflash.target_layers", [id + 1 for id in options["target_layer_ids"]])
        writer.add_mask_token_id(options["mask_token_id"])
        writer.add_uint32("dflash.block_size", plain["block_size"])
    dots = {"gemma4-dflash-draft": "dflash.", "dflash-draft": "dflash_"}.get(architecture, "")
    top = {"fc": f"{dots}fc", "hidden_norm": f"{dots}hidden_norm" if forked else "enc.output_norm"}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, plain["num_hidden_layers"])
    for own, values in load_file(goldens / NAME / "model.safetensors").items():
        stem = own.removesuffix(".weight")
        name = f"{top[stem]}.weight" if stem in top else names.get_name(f"model.{own}", try_suffixes=(".weight",))
        assert name is not None, own
        writer.add_tensor(name, values.astype(np.float32))
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def assert_same(found: checkpoints.Checkpoint, goldens: Path) -> None:
    expected = checkpoints.load(goldens / NAME)
    assert isinstance(found.config, DrafterConfig) and isinstance(expected.config, DrafterConfig)
    assert found.role == "drafter"
    eps = pytest.approx(expected.config.norm_eps)
    assert found.config.norm_eps == eps
    same = dataclasses.replace(found.config, num_target_layers=8, norm_eps=expected.config.norm_eps)
    assert same == expected.config
    assert set(found.parameters) == set(expected.parameters)
    for name, values in expected.parameters.items():
        np.testing.assert_array_equal(np.asarray(found.parameters[name]), np.asarray(values), err_msg=name)


def test_speculators(goldens: Path, tmp_path: Path) -> None:
    tensors = load_file(goldens / NAME / "model.safetensors")
    copies = {name: np.ones((96, 32), np.float32) for name in ("embed_tokens.weight", "lm_head.weight")}
    folder = write_folder(tmp_path / "drafter", speculators(goldens), {**tensors, **copies})
    assert_same(checkpoints.load(folder), goldens)
    assert set(read_folder(folder).skipped) == set(copies)


@pytest.mark.parametrize("architecture", ["dflash", "dflash-draft", "gemma4-dflash-draft"])
def test_gguf(goldens: Path, tmp_path: Path, architecture: str) -> None:
    assert_same(checkpoints.load(write_gguf(goldens, tmp_path / "drafter.gguf", architecture)), goldens)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"draft_vocab_size": 64}, "with a vocabulary and an lm_head of its own"),
        ({"projector_type": "domino"}, "projector_type"),
        ({"sample_from_anchor": True}, "that samples from the anchor"),
        ({"target_hidden_size": 64}, "of another width than its target"),
        ({"speculators_model_type": "eagle3"}, "'eagle3' is not supported; supported: dflash"),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids is missing"),
        ({"transformer_layer_config": None}, "transformer_layer_config is missing"),
        ({"mask_token_id": None}, "mask_token_id is missing"),
        ({"mask_token_id": 96}, "mask_token_id is 96, the vocabulary has 96"),
        ({"aux_hidden_state_layer_ids": [0, 2]}, "target_layer_ids [-1, 1]"),
    ],
)
def test_speculators_refused(goldens: Path, tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    tensors = load_file(goldens / NAME / "model.safetensors")
    folder = write_folder(tmp_path / "drafter", speculators(goldens, **changes), tensors)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(folder)
    assert found in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        ("layers.0.attention_conv.base_kernel", "has no place in a DFlash drafter model"),
        ("prefix_gru.weight_ih", "Domino, which is not supported; supported: DFlash 1, and 2 from safetensors"),
        ("markov_head.w1.weight", "DSpark"),
        ("d2t", "a reduced vocabulary"),
        ("layers.0.self_attn.qkv_proj.weight", "fused q, k and v"),
        ("surprise.weight", "is unknown in a DFlash drafter model"),
    ],
)
def test_tensors_of_other_drafters(goldens: Path, tmp_path: Path, tensor: str, found: str) -> None:
    tensors = {**load_file(goldens / NAME / "model.safetensors"), tensor: np.ones((2, 2), np.float32)}
    folder = write_folder(tmp_path / "drafter", described(goldens), tensors)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(folder)
    assert tensor in str(caught.value) and found in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        ("blk.0.attn_conv_base", "DFlash 2 in a GGUF file"),
        ("selector_hidden.weight", "DFlash 2"),
        ("markov_w1.weight", "DSpark"),
        ("d2t", "lm_head of its own"),
    ],
)
def test_tensors_of_other_drafters_in_gguf(goldens: Path, tmp_path: Path, tensor: str, found: str) -> None:
    file = write_gguf(goldens, tmp_path / "a.gguf", "dflash", **{tensor: np.ones((2, 32), np.float32)})
    with pytest.raises(CheckpointError, match=found):
        read_gguf(file)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"conv_kernel_size": 3, "conv_group_size": 8}, "conv_kernel_size is 3; supported: 2"),
        ({"conv_kernel_size": 2}, "conv_group_size is missing"),
        ({"conv_kernel_size": 2, "conv_group_size": 5}, "groups of 5 channels does not fit a width of 32"),
        ({"conv_kernel_size": 2, "conv_group_size": 8}, "tensor layers.0.attention_convolution.taps is missing"),
    ],
)
def test_options_of_a_convolution(goldens: Path, tmp_path: Path, options: dict[str, int], found: str) -> None:
    config = described(goldens)
    config["dflash_config"] |= options
    folder = write_folder(tmp_path / "drafter", config, load_file(goldens / NAME / "model.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(folder)
    assert found in str(caught.value) and "\n" not in str(caught.value)


def test_dflash_2_is_read_without_its_selector_and_written_as_published(goldens: Path, tmp_path: Path) -> None:
    published = load_file(goldens / "drafter_convolution" / "model.safetensors")
    with pytest.warns(CheckpointWarning, match="the candidate selector of DFlash 2 is left out"):
        loaded = checkpoints.load(goldens / "drafter_convolution", weights="bf16")
    assert isinstance(loaded.config, DrafterConfig)
    assert loaded.config.convolution_group == 8
    write_drafter(tmp_path, loaded.config, {name: np.asarray(each) for name, each in loaded.parameters.items()})
    written = load_file(tmp_path / "model-00001-of-00001.safetensors")
    kept = {name: values for name, values in published.items() if not name.startswith("candidate_selector")}
    assert {name: values.shape for name, values in written.items()} == {
        name: values.shape for name, values in kept.items()
    }
    for name, values in kept.items():
        np.testing.assert_array_equal(written[name], values.astype(ml_dtypes.bfloat16), err_msg=name)
    again = checkpoints.load(tmp_path)
    assert again.config == loaded.config


@pytest.mark.parametrize("weights", ["f32", "w8", "w4"])
def test_dflash_2_is_converted(goldens: Path, tmp_path: Path, weights: str) -> None:
    """Taps stay f32 in every format; corrections are matrices like others."""
    with pytest.warns(CheckpointWarning, match="left out"):
        checkpoints.convert(goldens / "drafter_convolution", tmp_path / "out", weights=weights, role="drafter")
    with pytest.warns(CheckpointWarning, match="left out"):
        published = checkpoints.load(goldens / "drafter_convolution")
    converted = checkpoints.load(tmp_path / "out")
    assert converted.config == published.config
    name = "layers.1.mlp_convolution"
    np.testing.assert_array_equal(
        np.asarray(converted.parameters[f"{name}.taps"]), np.asarray(published.parameters[f"{name}.taps"])
    )
    kind = {"f32": jax.Array, "w8": W8, "w4": W4}[weights]
    assert isinstance(converted.parameters[f"{name}.corrections"], kind)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"vocab_size": 128}, "its vocabulary is 128, the target's 96"),
        ({"num_target_layers": 12}, "its number of target layers is 12, the target's 3"),
    ],
)
def test_drafter_for_another_target(goldens: Path, tmp_path: Path, change: dict[str, Any], found: str) -> None:
    config = {**described(goldens), "num_target_layers": 3, **change}
    config["dflash_config"]["target_layer_ids"] = [0, 1, 2]
    folder = write_folder(tmp_path / "drafter", config, load_file(goldens / NAME / "model.safetensors"))
    with pytest.raises(CheckpointError, match=found):
        load_model(goldens / "qwen3", drafter=folder)


def test_drafter_that_reads_a_layer_that_the_target_lacks(goldens: Path, tmp_path: Path) -> None:
    tensors = load_file(goldens / NAME / "model.safetensors")
    folder = write_folder(tmp_path / "drafter", speculators(goldens), tensors)
    with pytest.raises(CheckpointError, match="it reads layer 5, the target has 3"):
        load_model(goldens / "qwen3", drafter=folder)


def test_drafter_of_another_width(goldens: Path, tmp_path: Path) -> None:
    config = {**described(goldens), "hidden_size": 64}
    tensors = load_file(goldens / NAME / "model.safetensors")
    with pytest.raises(CheckpointError, match="config and weights do not belong together"):
        load_model(goldens / "qwen3", drafter=write_folder(tmp_path / "drafter", config, tensors))
