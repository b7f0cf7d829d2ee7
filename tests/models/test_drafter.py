"""The drafter against z-lab's reference, over a context that grows as in decoding."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoints
from checkpoints.readers import CheckpointWarning
from dflash_jax.models.config import DrafterConfig
from dflash_jax.models.decoder import Place
from dflash_jax.models.drafter import (
    Drafter,
    TwoTapConvolution,
    block_tokens,
    convolved,
    empty_drafter_pools,
)

TOLERANCE = 5e-4
PAGE_SIZE = 4
PAGE_TABLE = np.array([[7, 3, 12, 1, 9, 5, 11, 2, 10, 4, 8, 6]], np.int32)


@dataclasses.dataclass
class Case:
    """A tiny drafter with pools of its own and what the reference computes with it."""

    config: DrafterConfig
    drafter: Drafter
    expected: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        empty = empty_drafter_pools(self.config, num_pages=1 + PAGE_TABLE.size, page_size=PAGE_SIZE, dtype=jnp.float32)
        self.pools = jax.tree.map(lambda array: jnp.full_like(array, 7.0), empty)

    @property
    def num_steps(self) -> int:
        return sum(name.startswith("block_") for name in self.expected)

    def read(self, features: np.ndarray, start: int) -> None:
        self.pools = self._call(Drafter.read, features, start)

    def draft(self, embeddings: np.ndarray, start: int) -> np.ndarray:
        hidden, self.pools = self._call(Drafter.__call__, embeddings, start)
        return np.asarray(hidden[0])

    def _call(self, method: Any, rows: np.ndarray, start: int) -> Any:
        graph, state = nnx.split(self.drafter)
        return call(method, graph, state, jnp.asarray(rows)[None], self.pools, jnp.asarray([start], jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def call(method: Any, graph: Any, state: Any, rows: Any, pools: Any, start: Any) -> Any:
    positions = start[:, None] + jnp.arange(rows.shape[1], dtype=jnp.int32)[None, :]
    return method(nnx.merge(graph, state), rows, pools, Place(jnp.asarray(PAGE_TABLE), start, positions, PAGE_SIZE))


@pytest.fixture(params=["drafter_full", "drafter_sliding", "drafter_convolution"])
def case(request: pytest.FixtureRequest, goldens: Path) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)  # hidden states do not depend on a selector
        checkpoint = checkpoints.load(goldens / request.param)
    drafter = Drafter(checkpoint.config, checkpoint.parameters, dtype=jnp.float32)
    with np.load(goldens / request.param / "expected.npz") as expected:
        return Case(checkpoint.config, drafter, dict(expected))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_blocks_over_a_growing_context(case: Case) -> None:
    start = 0
    for step in range(case.num_steps):
        features = case.expected[f"features_{step}"]
        case.read(features, start)
        start += len(features)
        assert_close(case.draft(case.expected[f"block_{step}"], start), case.expected[f"hidden_{step}"])


def test_features_of_rejected_rows_need_no_undoing(case: Case) -> None:
    """A verify yields features for a whole block; only those of committed rows may count."""
    start = 0
    for step in range(case.num_steps):
        features = case.expected[f"features_{step}"]
        missing = max(0, case.config.block_size - len(features))
        case.read(np.pad(features, ((0, missing), (0, 0)), constant_values=3.0), start)
        start += len(features)
        assert_close(case.draft(case.expected[f"block_{step}"], start), case.expected[f"hidden_{step}"])


def test_a_prompt_is_read_in_chunks(case: Case) -> None:
    features = case.expected["features_0"]
    for start in range(0, len(features), 6):
        case.read(features[start : start + 6], start)
    assert_close(case.draft(case.expected["block_0"], len(features)), case.expected["hidden_0"])


def test_a_row_takes_of_itself_and_of_its_left_neighbour() -> None:
    x = jnp.asarray([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], [[4.0, 40.0], [5.0, 50.0], [6.0, 60.0]]])
    own, left = [1.0, 2.0], [0.5, 1.0]
    taps = jnp.broadcast_to(jnp.asarray([own, left]), (2, 3, 2, 2))
    assert convolved(x, taps).tolist() == [
        [[1.0, 20.0], [2.5, 50.0], [4.0, 80.0]],
        [[4.0, 80.0], [7.0, 140.0], [8.5, 170.0]],
    ]


def test_groups_of_channels_share_corrections() -> None:
    """Four channels in two groups; corrections are [in front: own, own, left, left; behind: own, own, left, left]."""
    corrections = np.zeros((8, 4), np.float32)
    corrections[1, 0] = 10.0  # in front, own row, second group
    corrections[2, 0] = 100.0  # in front, left row, first group
    corrections[7, 0] = 7.0  # behind, left row, second group
    taps = np.asarray([[1, 2, 3, 4], [0, 0, 0, 1], [5, 5, 5, 5], [6, 6, 6, 6]], np.float32)
    convolution = TwoTapConvolution({"taps": jnp.asarray(taps), "corrections": jnp.asarray(corrections)})
    read, behind = convolution(jnp.asarray([[[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0]]]))
    assert read[0].tolist() == [[1, 2, 13, 14], [2 + 200, 2 + 200, 23, 24 + 1]]
    assert behind is not None
    assert behind[0].tolist() == [[[5, 5, 5, 5], [6, 6, 13, 13]], [[5, 5, 5, 5], [6, 6, 20, 20]]]


def test_block_is_the_anchor_and_masks(case: Case) -> None:
    tokens = block_tokens(jnp.asarray([17, 4], jnp.int32), case.config, case.config.block_size)
    assert tokens.tolist() == [[17] + [95] * 7, [4] + [95] * 7]
