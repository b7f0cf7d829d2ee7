"""The decoder against transformers, for every way in which the engine calls it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoints
from dflash_jax.engine.programs import put
from dflash_jax.models.config import ModelConfig
from dflash_jax.models.decoder import Decoder, Pass, Place, empty_pools
from dflash_jax.models.whole import read_whole
from pallas_kernels.residual_norm import api as norm_api
from pallas_kernels.residual_norm import triton as norm_triton
from tests.conftest import GOLDENS

MODELS = (
    "llama_tied",
    "llama_rope_scaled",
    "llama_window",
    "qwen2",
    "qwen3",
    "qwen3_tied",
    "gemma3",
    "gemma3_multimodal",
    "gemma4",
    "gemma4_experts",
    "gemma4_per_layer",
)
SLOW = ("llama_tied", "llama_rope_scaled", "qwen3_tied", "gemma3_multimodal")
"""What only these have are numbers in the config, or a table less."""
TOLERANCE = 5e-4
PAGE_SIZE = 8
# Pages of the two sequences are interleaved and out of order; page 0 belongs to nobody.
PAGE_TABLE = np.array([[5, 2, 11, 8, 1, 12], [3, 10, 4, 7, 9, 6]], np.int32)


@dataclasses.dataclass(eq=False)
class Target:
    """A tiny model, what transformers computes with it, and pools full of stale numbers."""

    config: ModelConfig
    decoder: Decoder
    expected: dict[str, np.ndarray]

    def pools(self) -> Any:
        empty = empty_pools(self.config, num_pages=1 + PAGE_TABLE.size, page_size=PAGE_SIZE, dtype=jnp.float32)
        return put(jax.tree.map(lambda array: jnp.full_like(array, 7.0), empty))

    def run(
        self, tokens: np.ndarray, pools: Any, starts: Sequence[int], positions: np.ndarray | None = None, **options: Any
    ) -> tuple[Pass, np.ndarray]:
        """One pass over rows `tokens` of both sequences, and the logits of every row."""
        if positions is None:
            positions = np.array(starts)[:, None] + np.arange(tokens.shape[1])
        rows, table, first, at = (jnp.asarray(array, jnp.int32) for array in (tokens, PAGE_TABLE, starts, positions))
        fields, logits = self._compiled(**options)(nnx.state(self.decoder), rows, pools, table, first, at)
        return Pass(**fields), np.asarray(logits)

    @functools.cache  # noqa: B019 - one target per model lives as long as the module's tests
    def _compiled(self, **options: Any) -> Any:
        graph = nnx.graphdef(self.decoder)

        @jax.jit
        def compiled(state: Any, rows: Any, pools: Any, table: Any, first: Any, at: Any) -> Any:
            decoder = nnx.merge(graph, state)
            result = decoder(rows, pools, Place(table, first, at, PAGE_SIZE), **options)
            return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}, decoder.logits(
                result.hidden
            )

        return compiled

    def everything(self) -> dict[str, Any]:
        """Options under which a pass tells all that it can: one program for the tests of whole passes."""
        last = self.config.num_layers - 1
        return {"capture": (last, *range(last)), "unrotated": (last,)}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS]
)
def target(request: pytest.FixtureRequest, goldens: Path) -> Target:
    checkpoint = checkpoints.load(goldens / request.param)
    decoder = Decoder(checkpoint.config, checkpoint.parameters, dtype=jnp.float32)
    with np.load(goldens / request.param / "expected.npz") as expected:
        return Target(checkpoint.config, decoder, dict(expected))


def assert_close(actual: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_one_pass_gives_the_residual_stream_after_every_layer(target: Target) -> None:
    result, logits = target.run(target.expected["input_ids"], target.pools(), [0, 0], **target.everything())

    last, *features = np.split(np.asarray(result.features), target.config.num_layers, axis=-1)  # in the order asked for
    for feature, expected in zip(features, target.expected["hidden_states"][1:-1], strict=True):
        assert_close(feature, expected)
    np.testing.assert_array_equal(last, result.hidden)
    assert_close(target.decoder.final_norm(result.hidden), target.expected["hidden_states"][-1])
    assert_close(logits, target.expected["logits"])


@pytest.mark.usefixtures("optimised")
def test_capturing_changes_no_bit_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, where a stream that XLA adds up differs from that of the kernel: with and without a drafter, alike."""
    kernel = functools.partial(norm_triton.residual_norm, interpret=True)
    monkeypatch.setattr(norm_api, "residual_norm", kernel)
    loaded = checkpoints.load(GOLDENS / "gemma4")
    graph, state = nnx.split(Decoder(loaded.config, loaded.parameters, dtype=jnp.bfloat16))
    ids = jnp.arange(16, dtype=jnp.int32)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def hidden(state: nnx.State, capture: tuple[int, ...]) -> jax.Array:
        return read_whole(nnx.merge(graph, state), ids, dtype=jnp.bfloat16, capture=capture).hidden

    plain = hidden(state, ())
    for capture in ((0,), (0, 1)):
        np.testing.assert_array_equal(hidden(state, capture), plain)


def test_chunks_and_single_rows_give_what_one_pass_gives(target: Target) -> None:
    tokens, pools, rows = target.expected["input_ids"], target.pools(), []
    ends = np.cumsum([16, 1, 1, 16, 1, 5])
    assert ends[-1] == tokens.shape[1]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        result, logits = target.run(tokens[:, start:end], pools, [start, start])
        pools = result.pools
        rows.append(logits)
    assert_close(np.concatenate(rows, axis=1), target.expected["logits"])


def test_sequences_stand_at_different_places(target: Target) -> None:
    tokens = target.expected["input_ids"]
    result, _ = target.run(tokens[:, :16], target.pools(), [0, 0])
    _, logits = target.run(np.stack([tokens[0, 16:32], tokens[1, 9:25]]), result.pools, [16, 9])
    assert_close(logits[0], target.expected["logits"][0, 16:32])
    assert_close(logits[1], target.expected["logits"][1, 9:25])


def test_rejected_rows_need_no_undoing(target: Target) -> None:
    tokens = target.expected["input_ids"]
    result, _ = target.run(tokens[:, :16], target.pools(), [0, 0])
    result, _ = target.run((tokens[:, 16:32] + 1) % target.config.vocab_size, result.pools, [16, 16])
    _, logits = target.run(tokens[:, 16:32], result.pools, [16, 16])
    assert_close(logits, target.expected["logits"][:, 16:32])


def test_positions_of_a_pruned_prompt_may_jump(target: Target) -> None:
    at, options = target.expected["gap_positions"], target.everything()
    _, logits = target.run(target.expected["input_ids"], target.pools(), [0, 0], positions=at, **options)
    assert_close(logits, target.expected["gap_logits"])


def test_early_exit_stops_after_the_layers_asked_for(target: Target) -> None:
    before, last = target.pools(), target.config.num_layers - 1
    result, _ = target.run(target.expected["input_ids"], before, [0, 0], num_layers=last, unrotated=(last,))
    assert_close(result.hidden, target.expected["hidden_states"][last])
    same = [jax.tree.all(jax.tree.map(np.array_equal, *pair)) for pair in zip(result.pools, before, strict=True)]
    assert same == [index == last for index in range(len(before))]
    assert_queries_and_keys(result, target)


def test_queries_and_keys_before_rope_of_a_layer_that_runs(target: Target) -> None:
    result, _ = target.run(target.expected["input_ids"], target.pools(), [0, 0], **target.everything())
    assert_queries_and_keys(result, target)


def assert_queries_and_keys(result: Pass, target: Target) -> None:
    ((queries, keys),) = result.unrotated
    assert_close(queries, target.expected["queries"])
    assert_close(keys, target.expected["keys"])
