"""Model records: the spellings that are found in practice, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflash_jax.bench import shapes
from dflash_jax.models.config import ConfigError, DrafterConfig, ModelConfig, RopeConfig
from dflash_jax.models.hf_config import default_target_layers, drafter_from_hf, from_hf

TARGETS = ("llama_tied", "llama_rope_scaled", "llama_window", "qwen2", "qwen3", "qwen3_tied")
GEMMAS = ("gemma3", "gemma3_multimodal", "gemma4", "gemma4_experts", "gemma4_per_layer")
SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4096}
DRAFTER: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_target_layers": 36,
    "rope_theta": 1000000,
    "block_size": 16,
    "dflash_config": {"mask_token_id": 151669},
}


def read(goldens: Path, name: str) -> dict[str, Any]:
    return json.loads((goldens / name / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TARGETS)
def test_rope_turns_by_the_frequencies_of_transformers(goldens: Path, name: str) -> None:
    layer = from_hf(read(goldens, name)).layers[0]
    with np.load(goldens / name / "expected.npz") as expected:
        np.testing.assert_allclose(
            layer.rope.inverse_frequencies(layer.head_dim), expected["inverse_frequencies"], rtol=1e-5
        )


@pytest.mark.parametrize("name", GEMMAS)
def test_both_ropes_of_a_gemma_turn_by_the_frequencies_of_transformers(goldens: Path, name: str) -> None:
    with np.load(goldens / name / "expected.npz") as expected:
        for layer in from_hf(read(goldens, name)).layers:
            label = "full" if layer.window is None else "sliding"
            frequencies = expected[f"{label}_inverse_frequencies"]
            np.testing.assert_allclose(layer.rope.inverse_frequencies(layer.head_dim), frequencies, rtol=1e-5)


def test_linear_rope_scaling_divides_every_frequency() -> None:
    rope = from_hf({**SMOLLM2, "rope_scaling": {"type": "linear", "factor": 4.0}}).layers[0].rope
    expected = [100000 ** (-2 * pair / 64) / 4 for pair in range(32)]
    np.testing.assert_allclose(rope.inverse_frequencies(64), expected, rtol=1e-12)


def test_partial_rope_leaves_the_last_pairs_still() -> None:
    steps = RopeConfig(theta=10.0, rotated_pairs=1).inverse_frequencies(8)
    assert steps == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", TARGETS)
def test_both_spellings_of_rope_mean_the_same(goldens: Path, name: str) -> None:
    new = read(goldens, name)
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    scaling = dict(new.get("rope_parameters") or {})
    old["rope_theta"] = scaling.pop("rope_theta", 10000.0)
    old["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    assert from_hf(old) == from_hf(new)


def test_numbers_of_a_published_model() -> None:
    config = from_hf(SMOLLM2)
    assert (config.family, config.num_layers, config.hidden_size, config.vocab_size) == ("llama", 30, 576, 49152)
    assert (config.context_length, config.norm_eps, config.tied_embeddings) == (8192, 1e-5, True)
    assert (config.bos_id, config.stop_ids) == (1, (2,))
    layer = config.layers[0]
    assert (layer.head_dim, layer.num_kv_heads, layer.mlp_width, layer.window) == (64, 3, 1536, None)
    assert layer.attention_scale == 1 / math.sqrt(64)
    assert layer.rope == RopeConfig(theta=100000.0)


def test_several_stop_ids_are_kept() -> None:
    assert from_hf({**SMOLLM2, "eos_token_id": [128001, 128008, 128009]}).stop_ids == (128001, 128008, 128009)


# transformers applies the field in Mistral models alone, and 4096 where a Mistral config does not say.
@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"sliding_window": 4096}, None),
        ({"sliding_window": 4096, "use_sliding_window": True}, None),
        ({"model_type": "mistral", "sliding_window": 512}, 512),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "qwen3", "sliding_window": 4096}, None),
        ({"model_type": "qwen3", "sliding_window": 4096, "use_sliding_window": False}, None),
        ({"model_type": "qwen3", **WINDOW, "max_window_layers": 0}, 4096),
    ],
)
def test_a_window_is_applied_where_transformers_applies_it(change: dict[str, Any], window: int | None) -> None:
    assert {layer.window for layer in from_hf({**SMOLLM2, **change}).layers} == {window}


@pytest.mark.parametrize(
    ("change", "found", "wanted"),
    [
        ({"model_type": "mamba"}, "'mamba'", "supported: llama, qwen2, qwen3"),
        ({"model_type": None}, "None", "supported: llama, qwen2, qwen3"),
        ({"hidden_size": None}, "hidden_size", ""),
        ({"num_hidden_layers": "thirty"}, "'thirty'", "whole number"),
        ({"vocab_size": -1}, "-1", "whole number"),
        ({"hidden_act": "relu"}, "'relu'", "supported: silu"),
        ({"rope_theta": "x"}, "rope_theta is 'x'", "a number above 0"),
        ({"rope_theta": -1}, "rope_theta is -1", "a number above 0"),
        ({"rope_scaling": {"rope_theta": [1]}}, "rope_theta is [1]", "a number above 0"),
        ({"eos_token_id": "a"}, "eos_token_id is 'a'", "a token id"),
        ({"eos_token_id": [1, None]}, "eos_token_id is [1, None]", "a token id"),
        ({"bos_token_id": {}}, "bos_token_id is {}", "a token id"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0", "at least 1"),
        ({"model_type": "gemma3_text", "rope_local_base_freq": "x"}, "rope_local_base_freq is 'x'", ""),
        ({"mlp_bias": True}, "mlp_bias", "not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'", "supported: default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor", "llama3"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 30, **WINDOW}, "'linear_attention'", ""),
        ({"model_type": "qwen3", "layer_types": ["full_attention"], **WINDOW}, "1 entries for 30", ""),
    ],
)
def test_what_is_not_supported_is_named_in_one_line(change: dict[str, Any], found: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf({**SMOLLM2, **change})
    message = str(caught.value)
    assert found in message
    assert wanted in message
    assert "\n" not in message


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        from_hf({key: value for key, value in SMOLLM2.items() if key != field})


@pytest.mark.parametrize("name", TARGETS)
def test_target_record_survives_its_file(goldens: Path, name: str) -> None:
    config = from_hf(read(goldens, name))
    assert ModelConfig.from_json(config.to_json()) == config
    assert hash(ModelConfig.from_json(config.to_json())) == hash(config)


@pytest.mark.parametrize("name", ["drafter_full", "drafter_sliding"])
def test_drafter_record_survives_its_file(goldens: Path, name: str) -> None:
    config = drafter_from_hf(read(goldens, name))
    assert DrafterConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": []}', '{"layers": [{"rope": {}}], "stop_ids": []}'])
def test_a_damaged_record_is_refused(text: str) -> None:
    for record in (ModelConfig, DrafterConfig):
        with pytest.raises(ConfigError, match="convert"):
            record.from_json(text)


# Published with z-lab's drafters of Qwen3-4B, Qwen3.5-4B and Qwen3.6-27B.
@pytest.mark.parametrize(
    ("num_target_layers", "layers"),
    [(36, (1, 9, 17, 25, 33)), (32, (1, 8, 15, 22, 29)), (64, (1, 16, 31, 46, 61))],
)
def test_default_target_layers_are_those_of_published_drafters(num_target_layers: int, layers: tuple[int, ...]) -> None:
    assert default_target_layers(num_target_layers, len(layers)) == layers


@pytest.mark.parametrize(("num_target_layers", "layers"), [(1, 2), (3, 2), (4, 2), (7, 5)])
def test_a_target_with_too_few_layers_for_a_drafter_is_refused(num_target_layers: int, layers: int) -> None:
    with pytest.raises(ConfigError, match=f"reads {layers} layers of a target of {num_target_layers}"):
        default_target_layers(num_target_layers, layers)


@given(st.integers(1, 200), st.integers(1, 20))
def test_default_target_layers_are_distinct_layers_of_the_target(num_target_layers: int, count: int) -> None:
    try:
        layers = default_target_layers(num_target_layers, count)
    except ConfigError:
        assert count > max(num_target_layers - 3, 1)
        return
    assert len(set(layers)) == count
    assert set(layers) <= set(range(num_target_layers))


def test_numbers_of_a_published_drafter() -> None:
    config = drafter_from_hf(DRAFTER)
    assert (config.num_layers, config.block_size, config.mask_id) == (5, 16, 151669)
    assert config.target_layers == (1, 9, 17, 25, 33)
    assert config.windows == (None,) * 5
    assert config.causal == (False,) * 5


def test_sliding_layers_of_a_drafter_are_causal_unless_it_says_otherwise(goldens: Path) -> None:
    published = read(goldens, "drafter_sliding")
    config = drafter_from_hf(published)
    assert (config.windows, config.causal) == ((12, None), (True, False))
    assert drafter_from_hf({**published, "is_causal": False}).causal == (False, False)


def test_newer_drafters_keep_the_block_size_in_their_own_section() -> None:
    newer = {key: value for key, value in DRAFTER.items() if key != "block_size"}
    newer["dflash_config"] = {**DRAFTER["dflash_config"], "block_size": 8}
    assert drafter_from_hf(newer).block_size == 8


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"dflash_config": {}}, "mask_token_id"),
        ({"dflash_config": {"mask_token_id": 4, "projector_type": "domino"}}, "projector_type"),
        ({"num_target_layers": None}, "num_target_layers"),
    ],
)
def test_what_a_drafter_lacks_is_named(change: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        drafter_from_hf({**DRAFTER, **change})


def test_numbers_that_a_token_stores_in_a_layer() -> None:
    """Gemma 4's full layers store V and the dims of K that turn; E2B's share pools, so they store K and V."""
    config = from_hf(shapes.TARGETS["gemma4-31b"])
    assert [config.kv_numbers(layer) for layer in config.layers[4:6]] == [16 * (256 + 256), 4 * (128 + 512)]
    assert sum(config.kv_numbers(layer) for layer in config.layers if layer.window is None) * 2 == 10 * 5 * 1024
    raw = dataclasses.replace(config, v_norm=False)
    assert raw.kv_numbers(config.layers[5]) == 4 * (512 + 512)
    shared = dataclasses.replace(config, layers=(*config.layers, dataclasses.replace(config.layers[5], kv_source=5)))
    assert shared.kv_numbers(config.layers[5]) == 4 * (512 + 512)
