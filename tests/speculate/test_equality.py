"""Greedy answers are the same tokens with and without DFlash: a batch of slots, each with an end of its own.

Every number of rows that a step may verify meets drafters that are right, half right, wrong and hostile, and slots that
end at a stop token anywhere in a block, at their limit, with one token left and at the last place of their page table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.models.decoder import Decoder, empty_pools
from dflash_jax.speculate import loop
from dflash_jax.speculate.loop import decode, prefill
from dflash_jax.speculate.sampling import SamplingParameters
from dflash_jax.speculate.step import Networks, Pools, Slots
from tests.tiny import F32, PAGE_SIZE, TARGET, VOCABULARY, tiny_target
from tools.check_equality import SCRIPTED, script_of

pytestmark = pytest.mark.slow

ROWS = (2, 4, 8, 12, 16)
LONGEST, PAGES = 40, 4
WINDOW = PAGES * PAGE_SIZE
PROMPT = WINDOW - LONGEST + 1
LENGTH = LONGEST + 16
STOP_ID = 257
LIMITS = (1, 2, 3, 15, 16, 17, 31, 32, 33, LONGEST)
STOPS_AT = (1, 2, 4, 8, 15, 16, 17, 30)
"""For slots that end at a stop token: about which token of the answer that is."""
SLOTS = len(LIMITS) + len(STOPS_AT)


class Scripts:
    """Stands where a drafter does and proposes `tokens[slot, n]` for token n of a slot's answer."""

    config = SimpleNamespace(target_layers=())

    def __init__(self, tokens: jax.Array) -> None:
        self.tokens = tokens


def propose_scripts(
    networks: Any, pools: Pools, slots: Slots, sampling: Any, *, rows: int, page_size: int
) -> tuple[jax.Array, Pools]:
    numbers = slots.number[:, None] + jnp.arange(rows - 1, dtype=jnp.int32)[None, :]
    return jnp.take_along_axis(networks.drafter.tokens, numbers, axis=1, mode="clip"), pools


@pytest.fixture(scope="module")
def target() -> Decoder:
    config = dataclasses.replace(TARGET, context_length=WINDOW, stop_ids=(STOP_ID,))
    return tiny_target(config=config)


@pytest.fixture(scope="module")
def answer(target: Decoder) -> Iterator[Any]:
    """(limits, stop ids, scripts or None, rows) -> the answers, the number of steps and the slots at the end."""
    patched = pytest.MonkeyPatch()
    patched.setattr(loop, "propose", propose_scripts)
    prompts = np.random.default_rng(5).integers(0, VOCABULARY, (SLOTS, PROMPT), dtype=np.int32)
    table = 1 + jnp.arange(SLOTS * PAGES, dtype=jnp.int32).reshape(SLOTS, PAGES)
    zeros, length = jnp.zeros(SLOTS, jnp.int32), jnp.full(SLOTS, PROMPT - 1, jnp.int32)
    sampling = SamplingParameters(
        temperature=jnp.zeros(SLOTS, jnp.float32),
        top_k=zeros,
        top_p=jnp.ones(SLOTS, jnp.float32),
        min_p=jnp.zeros(SLOTS, jnp.float32),
        seed=jnp.zeros((SLOTS, 2), jnp.uint32),
    )

    @functools.partial(jax.jit, static_argnames=("rows", "draft"))
    def run(limits: jax.Array, stop_ids: jax.Array, scripts: jax.Array, *, rows: int, draft: bool) -> Any:
        networks: Any = Networks(target, Scripts(scripts))  # type: ignore[arg-type]
        pools = Pools(empty_pools(target.config, num_pages=1 + SLOTS * PAGES, page_size=PAGE_SIZE, dtype=F32), ())
        positions = jnp.tile(jnp.arange(PROMPT - 1, dtype=jnp.int32), (SLOTS, 1))
        stored = jnp.asarray(prompts[:, :-1])
        pools = prefill(networks, pools, stored, positions, table, zeros, page_size=PAGE_SIZE)
        slots = Slots(
            page_table=table,
            length=length,
            position=length,
            anchor=jnp.asarray(prompts[:, -1]),
            number=zeros,
            limit=limits,
            stop_ids=stop_ids,
            live=jnp.ones(SLOTS, jnp.bool_),
        )
        visit, _, slots = decode(
            networks,
            pools,
            slots,
            sampling,
            jnp.int32(LONGEST),
            draft=draft,
            rows=rows,
            capacity=LONGEST + rows,
            page_size=PAGE_SIZE,
        )
        return visit.tokens, visit.steps, slots

    def answer(
        limits: np.ndarray, stop_ids: np.ndarray, scripts: np.ndarray | None, rows: int
    ) -> tuple[list[list[int]], int, Slots]:
        proposals = np.zeros((SLOTS, LENGTH), np.int32) if scripts is None else scripts
        tokens, steps, slots = run(limits, stop_ids, proposals, rows=rows, draft=scripts is not None)
        return [[token for token in row if token >= 0] for row in np.asarray(tokens).tolist()], int(steps), slots

    yield answer
    patched.undo()


@pytest.fixture(scope="module")
def plain(answer: Any) -> tuple[np.ndarray, np.ndarray, list[list[int]], list[list[int]]]:
    """Limits, stop ids, the answers without an end before LONGEST, and the answers with them, decoded plainly."""
    limits = np.full(SLOTS, LONGEST, np.int32)
    nothing = np.full((SLOTS, 1), -1, np.int32)
    whole, _, _ = answer(limits, nothing, None, 1)
    stop_ids = nothing.copy()
    for slot, first in enumerate(STOPS_AT):
        ids = whole[slot]
        new = [n for n, token in enumerate(ids) if token not in ids[:n]]
        stop_ids[slot] = ids[min(new, key=lambda n: abs(n - first))]
    limits[len(STOPS_AT) :] = LIMITS
    ended, steps, slots = answer(limits, stop_ids, None, 1)
    assert steps == LONGEST
    assert int(slots.length.max()) == WINDOW
    for slot, ids in enumerate(ended):
        stop = whole[slot].index(stop_ids[slot, 0]) + 1 if slot < len(STOPS_AT) else LONGEST
        assert ids == whole[slot][: min(stop, limits[slot])]
    return limits, stop_ids, whole, ended


@pytest.mark.parametrize("rows", ROWS)
def test_tokens_and_ends_are_those_of_plain_decoding(target: Decoder, answer: Any, plain: Any, rows: int) -> None:
    limits, stop_ids, whole, expected = plain
    model: Any = SimpleNamespace(target=target)
    for kind in SCRIPTED:
        scripts = np.stack([script_of(kind, ids, model, LENGTH) for ids in whole])
        found, steps, slots = answer(limits, stop_ids, scripts, rows)
        assert found == expected, kind
        assert not np.asarray(slots.live).any()
        assert np.asarray(slots.anchor).tolist() == [ids[-1] for ids in expected]
        assert np.asarray(slots.length).tolist() == [PROMPT - 1 + len(ids) for ids in expected]
        if kind == "right":
            assert steps == -(-LONGEST // rows)
        if kind in ("wrong", "beyond the vocabulary"):
            assert steps == LONGEST
