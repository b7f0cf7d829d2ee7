"""Implementations of attention as tests run them, and what they should give."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from pallas_kernels.block_attention import api as block_attention
from pallas_kernels.block_attention import triton as attention_triton
from pallas_kernels.cases.attention import AttentionCase
from tests.pallas_kernels.running import one_program

ATTENTION = {
    "reference": one_program(block_attention.block_attention, implementation="reference"),
    "triton": functools.partial(attention_triton.block_attention, interpret=True),
    "triton, keys first": functools.partial(
        attention_triton.block_attention, interpret=True, config=attention_triton.Config(32, 64, keys_first=True)
    ),
}
IMPLEMENTATIONS = ["reference", "triton", pytest.param("triton, keys first", marks=pytest.mark.slow)]


def dense_attention(case: AttentionCase) -> np.ndarray:
    """What a case's attention should give, in f64, a row and head after the other."""
    (queries, key_pool, value_pool, table, starts, *trees), _ = case.arguments()
    queries, key_pool, value_pool = (np.asarray(x, np.float64) for x in (queries, key_pool, value_pool))
    out = np.zeros((*queries.shape[:3], case.head_dim))
    key_pool = key_pool if case.key_dim is None else np.concatenate([key_pool, value_pool], axis=-1)
    group = case.heads // case.kv_heads
    for slot, start in enumerate(np.asarray(starts)):
        number, offset = np.divmod(np.arange(start + case.rows), case.page_size)
        place = np.asarray(table)[slot, number % case.pages] * case.page_size + offset
        for row in range(case.rows):
            keys = np.arange(start + row + 1 if case.causal else start + case.rows)
            tokens, token = keys, start + row  # where keys and the row stand in the text
            for tree in trees:
                ancestors = np.flatnonzero(int(tree.sees[slot, row]) >> np.arange(case.rows) & 1)
                keys = np.concatenate([np.arange(start), start + ancestors])
                tokens, token = np.arange(len(keys)), len(keys) - 1
            if case.window is not None:
                keys = keys[token - tokens < case.window]
            for head in range(case.heads):
                k, v = key_pool[place[keys], head // group], value_pool[place[keys], head // group]
                scores = k @ queries[slot, row, head] * case.head_dim**-0.5
                weights = np.exp(scores - scores.max())
                out[slot, row, head] = weights @ v / weights.sum()
    return out
