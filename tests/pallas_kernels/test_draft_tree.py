"""Trees of proposals: both implementations against a heap."""

from __future__ import annotations

import functools
import heapq
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases.drafting import LARGE_DRAFT_TREE, SMALL_DRAFT_TREE, DraftTreeCase
from pallas_kernels.draft_tree import api, reference, triton
from pallas_kernels.operations import nodes_of_tree, shapes
from tests.pallas_kernels.running import each_case, lower, one_program

RUN = {
    "reference": one_program(reference.draft_tree),
    "triton": functools.partial(triton.draft_tree, interpret=True),
}
Node = tuple[int, ...]
"""Candidates from the anchor's child to the node itself."""


def heap_tree(scores: np.ndarray, nodes: int) -> list[Node]:
    """The likeliest nodes with a heap, likeliest first (arXiv 2604.12989, algorithm 1)."""
    heap: list[tuple[np.float32, Node]] = []

    def push_children(score: np.float32, node: Node) -> None:
        if len(node) < len(scores):
            for choice, own in enumerate(scores[len(node), node[-1] if node else 0]):
                heapq.heappush(heap, (-(score + own), (*node, choice)))

    push_children(np.float32(0), ())
    taken = []
    while heap and len(taken) < nodes:
        score, node = heapq.heappop(heap)
        taken.append(node)
        push_children(-score, node)
    return taken


@pytest.mark.parametrize("implementation", RUN)
@each_case(SMALL_DRAFT_TREE)
def test_the_tree_is_the_one_that_a_heap_gives(case: DraftTreeCase, implementation: str) -> None:
    (anchor, candidates, scores), keywords = case.arguments()
    tree = RUN[implementation](anchor, candidates, scores, **keywords)
    assert np.array_equal(tree.tokens[:, 0], anchor)
    for slot in range(case.slots):
        nodes: list[Node] = [(), *heap_tree(np.asarray(scores[slot]), case.rows - 1)]
        for row, node in enumerate(nodes):
            if row:
                assert int(tree.tokens[slot, row]) == int(candidates[slot, len(node) - 1, node[-1]])
                assert nodes[int(tree.parents[slot, row])] == node[:-1]
            assert int(tree.ancestry.depths[slot, row]) == len(node)
            bits = int(tree.ancestry.sees[slot, row])
            seen = [other for at, other in enumerate(nodes) if bits >> at & 1]
            assert seen == [node[:length] for length in range(len(node) + 1)]
        assert np.all(np.asarray(tree.tokens)[slot, len(nodes) :] == -1)


@pytest.mark.parametrize("implementation", RUN)
def test_what_cannot_be_is_no_node(implementation: str) -> None:
    nothing = -jnp.inf
    scores = jnp.asarray([[[[-0.1, nothing], [0, 0]], [[-0.2, nothing], [nothing, -0.1]]]], jnp.float32)
    candidates = jnp.asarray([[[1, 2], [3, 4]]], jnp.int32)
    tree = RUN[implementation](jnp.asarray([9], jnp.int32), candidates, scores, rows=5)
    assert tree.tokens.tolist() == [[9, 1, 3, -1, -1]]


@pytest.mark.parametrize("case", [*SMALL_DRAFT_TREE, *LARGE_DRAFT_TREE], ids=lambda case: case.name)
def test_lowers_for_cuda(case: DraftTreeCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(nodes_of_tree, **keywords, implementation="triton"), positional)


def test_wrong_arguments_are_refused() -> None:
    def tree(count: int, rows: int, **keywords: Any) -> Any:
        anchor, candidates = jnp.zeros(1, jnp.int32), jnp.zeros((1, 3, count), jnp.int32)
        return api.draft_tree(anchor, candidates, jnp.zeros((1, 3, count, count)), rows=rows, **keywords)

    with pytest.raises(ValueError, match="rows is 33: a tree has between 2 and 32"):
        tree(8, 33)
    with pytest.raises(NotImplementedError, match="power of two of candidates, got 6"):
        tree(6, 16, implementation="triton")
    with pytest.raises(NotImplementedError, match="'heap'"):
        tree(8, 16, implementation="heap")
