"""Times that `bench kernels` has no place for: cuDNN's attention, steps of 64 rows, and pruning of a long prompt.

    python tools/compare_kernels.py [--json FILE]

- Chunks of a prompt by the kernel that is chosen for them and by cuDNN (jax.nn.dot_product_attention on keys that lie
  one behind the other; it masks nothing here: every row sees the chunk's last key, and all keys of a chunk's windows).
- Four answers at a time, 64 rows in one call, beside one answer's 16.
- From scores of every layer to the tokens that are kept, of 131,072.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dflash_jax.bench.report import environment, write
from dflash_jax.compress import prune
from pallas_kernels.block_attention.api import block_attention
from pallas_kernels.cases.attention import LARGE_ATTENTION, AttentionCase
from pallas_kernels.cases.matmul import LARGE_MATMUL
from pallas_kernels.quantised_matmul import bench
from pallas_kernels.quantised_matmul.api import matmul
from pallas_kernels.timing import copies_of, repeated, seconds_of

_CHUNK, _STEP, _SLOTS = 512, 16, 4
_REPEATS = 10
_TOKENS, _SCORED_LAYERS = 131_072, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    report = {**environment(), "command": " ".join(["python", *sys.argv]), "rows": rows}
    for row in itertools.chain(chunks(), more_rows(), [pruning()]):
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(arguments.json, report)


def chunks() -> Iterator[dict[str, Any]]:
    """Attention of prompts: heads of up to 256 numbers; cuDNN takes no more."""
    for case in LARGE_ATTENTION:
        if case.rows >= _CHUNK and case.key_dim is None:
            yield {"case": case.name, "us": _attention(case), **_by_cudnn(case)}


def more_rows() -> Iterator[dict[str, Any]]:
    """The same weights, and as many keys for each answer, for 16 rows and for 64."""
    for case in LARGE_MATMUL:
        if case.rows == _STEP and case.weights == "w4" and case.name.startswith("Gemma 4 31B"):
            yield _beside(case.name, _matmul(case), _matmul(dataclasses.replace(case, rows=_SLOTS * _STEP)))
    for case in LARGE_ATTENTION:
        if case.rows == _STEP and not case.tree and case.name.startswith("Gemma 4 31B"):
            pages = 1 + (case.lengths[0] + case.rows) // case.page_size
            one = case if case.ring else dataclasses.replace(case, pages=pages)
            four = dataclasses.replace(one, lengths=one.lengths * _SLOTS)
            yield _beside(case.name, _attention(one), _attention(four))


def pruning() -> dict[str, Any]:
    """Smoothing, one scale for all layers, whole chunks under a budget; without the copy to the host."""
    scores = jax.random.uniform(jax.random.key(0), (_SCORED_LAYERS, _TOKENS))
    droppable, budget = jnp.ones(_TOKENS, jnp.bool_), jnp.int32(_TOKENS // 20)

    def keep(scores: jax.Array) -> jax.Array:
        return prune._select(scores, droppable, jnp.int32(_TOKENS), budget).astype(jnp.float32)

    return {"case": f"pruning of {_TOKENS} tokens, {_SCORED_LAYERS} layers", "us": _time(keep, scores, [()])}


def _beside(name: str, one: float, four: float) -> dict[str, Any]:
    return {"case": name, "us": one, "us_64_rows": four, "ratio": round(four / one, 2)}


def _matmul(case: Any) -> float:
    x, weight = bench.random(case)
    return _time(matmul, x, [(each,) for each in copies_of(weight, case.bytes, most=8)])


def _attention(case: AttentionCase) -> float:
    (queries, *rest), keywords = case.arguments()
    return _time(functools.partial(block_attention, **keywords), queries, copies_of(rest, case.bytes, most=4))


def _by_cudnn(case: AttentionCase) -> dict[str, Any]:
    keys = min(case.lengths[0], case.window or case.lengths[0]) + case.rows
    shapes = ((case.rows, case.heads), (keys, case.kv_heads), (keys, case.kv_heads))
    query, key, value = (
        jax.random.normal(jax.random.key(number), (1, *shape, case.head_dim), case.dtype)
        for number, shape in enumerate(shapes)
    )

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")

    try:
        return {"us_cudnn": _time(attend, query, copies_of((key, value), key.nbytes + value.nbytes, most=4))}
    except Exception as error:  # no cuDNN, or not for these heads
        return {"cudnn": f"{type(error).__name__}: {error}".splitlines()[0][:120]}


def _time(function: Callable[..., jax.Array], first: jax.Array, sets: Any) -> float:
    """Microseconds of a call."""
    return round(1e6 * seconds_of(repeated(function, _REPEATS), first, sets) / _REPEATS / len(sets), 1)


if __name__ == "__main__":
    main()
