"""A greedy walk, which is done at once, goes where one goes that follows the children one by one."""

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.speculate.walk import walk
from pallas_kernels.block_attention.ancestry import Ancestry
from pallas_kernels.draft_tree.api import Tree
from tests.speculate.test_sampling import parameters

SLOTS, ROWS, LEVELS, VOCABULARY = 50, 16, 7, 3


def random_tree(generator: np.random.Generator) -> Tree:
    """Children of a node differ; rows that find no place hold no node."""
    tokens, parents, depths = np.full((SLOTS, ROWS), -1), np.zeros((SLOTS, ROWS)), np.zeros((SLOTS, ROWS))
    sees = np.tile(np.uint32(1) | np.uint32(1) << np.arange(ROWS, dtype=np.uint32), (SLOTS, 1))
    for slot in range(SLOTS):
        tokens[slot, 0] = generator.integers(VOCABULARY)
        for row in range(1, ROWS):
            parent, token = generator.integers(row), generator.integers(VOCABULARY)
            taken = any(parents[slot, other] == parent and tokens[slot, other] == token for other in range(1, row))
            if not taken and depths[slot, parent] < LEVELS and tokens[slot, parent] >= 0:
                tokens[slot, row], parents[slot, row] = token, parent
                depths[slot, row] = depths[slot, parent] + 1
                sees[slot, row] = sees[slot, parent] | np.uint32(1 << row)
    integers = [jnp.asarray(each, jnp.int32) for each in (tokens, parents, depths)]
    return Tree(*integers[:2], Ancestry(integers[2], jnp.asarray(sees)))


@pytest.mark.parametrize("seed", range(3))
def test_a_greedy_walk_follows_the_targets_tokens(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tree = random_tree(generator)
    logits = generator.standard_normal((SLOTS, ROWS, VOCABULARY), np.float32)
    sampling, nothing = parameters(SLOTS, 0.0), jnp.zeros(SLOTS, jnp.int32)
    walked = walk(jnp.asarray(logits), sampling, nothing, tree, nothing[:, None] - 1, levels=LEVELS)
    own, furthest = logits.argmax(axis=-1), 0
    for slot in range(SLOTS):
        path = [0]
        while True:
            here = np.asarray(tree.parents[slot] == path[-1]) & np.asarray(tree.tokens[slot] == own[slot, path[-1]])
            children = [row for row in np.flatnonzero(here) if row > 0]
            if not children:
                break
            path.append(children[0])
        accepted, furthest = len(path) - 1, max(furthest, len(path))
        assert int(walked.accepted[slot]) == accepted
        assert walked.path[slot].tolist() == [*path, *range(accepted + 1, LEVELS + 1)]
        assert walked.drawn.tokens[slot, : accepted + 1].tolist() == own[slot, path].tolist()
    assert furthest > 3
