"""Greedy and sampled answers are the same tokens with any drafter and with none."""

from __future__ import annotations

import dataclasses
import functools
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
from dflash_jax.models.decoder import Decoder, Place, empty_pools
from dflash_jax.models.drafter import empty_drafter_pools
from dflash_jax.speculate.loop import Visit, decode, prefill
from dflash_jax.speculate.sampling import SamplingParameters
from dflash_jax.speculate.step import Networks, Pools, Slots
from tests.tiny import DRAFTER, F32, PAGE_SIZE, TARGET, VOCABULARY, ScriptedDrafter, tiny_drafter, tiny_target

PROMPT = np.random.default_rng(3).integers(0, VOCABULARY, 21, dtype=np.int32)
PAGES = 8
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01}


@pytest.fixture(scope="module")
def target() -> Decoder:
    return tiny_target()


@functools.partial(jax.jit, static_argnums=(0, 2))
def _read(
    target_graph: Any, target_state: Any, drafter_graph: Any, drafter_state: Any, pools: Pools, *prompt: jax.Array
) -> Pools:
    """A prompt is read, compiled once per kind of drafter."""
    networks = Networks(nnx.merge(target_graph, target_state), nnx.merge(drafter_graph, drafter_state))
    return prefill(networks, pools, *prompt, page_size=PAGE_SIZE)


@functools.partial(jax.jit, static_argnums=(0, 2), static_argnames=("rows", "capacity", "tree"), donate_argnums=(4,))
def _visit(
    target_graph: Any,
    target_state: Any,
    drafter_graph: Any,
    drafter_state: Any,
    pools: Pools,
    slots: Slots,
    parameters: SamplingParameters,
    max_steps: jax.Array,
    *,
    rows: int,
    capacity: int,
    tree: bool = False,
) -> tuple[Visit, Pools, Slots]:
    """A visit, compiled once per kind of drafter, number of rows and capacity."""
    drafter = nnx.merge(drafter_graph, drafter_state)
    networks = Networks(nnx.merge(target_graph, target_state), drafter)
    return decode(
        networks,
        pools,
        slots,
        parameters,
        max_steps,
        draft=drafter is not None,
        rows=rows,
        capacity=capacity,
        page_size=PAGE_SIZE,
        tree=tree,
    )


def answer(
    target: Decoder,
    drafter: Any,
    tokens: int,
    *,
    rows: int = 16,
    options: dict[str, float] = GREEDY,
    stop_ids: tuple[int, ...] = (),
    max_steps: int = 3,
    first_position: int | None = None,
    prompt: np.ndarray = PROMPT,
    tree: bool = False,
) -> tuple[list[int], int]:
    """Token ids and steps of an answer; the host looks every `max_steps` steps."""
    networks = (*nnx.split(target), *nnx.split(drafter))
    sizes = {"num_pages": PAGES + 1, "page_size": PAGE_SIZE, "dtype": F32}
    drafter_pools = empty_drafter_pools(drafter.config, **sizes) if drafter else ()
    pools = put(Pools(empty_pools(target.config, **sizes), drafter_pools))
    table = jnp.arange(1, PAGES + 1, dtype=jnp.int32)[None]
    length = len(prompt) - 1

    def one(value: int) -> jax.Array:
        return jnp.asarray([value], jnp.int32)

    positions = jnp.arange(length, dtype=jnp.int32)[None]
    pools = _read(*networks, pools, jnp.asarray(prompt[None, :-1]), positions, table, one(0))
    slots = Slots(
        page_table=table,
        length=one(length),
        position=one(length if first_position is None else first_position),
        anchor=one(int(prompt[-1])),
        number=one(0),
        limit=one(tokens),
        stop_ids=jnp.asarray([[*stop_ids, -1, -1][:2]], jnp.int32),
        live=jnp.asarray([True]),
    )
    parameters = SamplingParameters(
        temperature=jnp.asarray([options["temperature"]], jnp.float32),
        top_k=jnp.asarray([options["top_k"]], jnp.int32),
        top_p=jnp.asarray([options["top_p"]], jnp.float32),
        min_p=jnp.asarray([options["min_p"]], jnp.float32),
        seed=jnp.asarray([[0, 11]], jnp.uint32),
    )
    slots, parameters = put((slots, parameters))
    ids: list[int] = []
    steps = 0
    while bool(slots.live[0]):
        sizes = {"rows": rows, "capacity": 3 * rows}
        visit, pools, slots = _visit(*networks, pools, slots, parameters, np.int32(max_steps), **sizes, tree=tree)
        ids += np.asarray(visit.tokens)[0, : int(visit.count[0])].tolist()
        steps += int(visit.steps)
    assert int(slots.length[0]) == length + len(ids)
    assert int(slots.anchor[0]) == ids[-1]
    return ids, steps


def script_of(ids: list[int]) -> list[int]:
    """What an oracle must know: the token at every position."""
    return PROMPT.tolist() + ids


def teacher(target: Decoder, ids: list[int]) -> np.ndarray:
    """The target's logits for a whole sequence in one pass, the plainest way to run it."""
    tokens = np.concatenate([PROMPT, np.asarray(ids, np.int32)])
    pools = empty_pools(TARGET, num_pages=PAGES + 1, page_size=PAGE_SIZE, dtype=F32)
    table = jnp.arange(1, PAGES + 1, dtype=jnp.int32)[None]
    place = (table, jnp.zeros(1, jnp.int32), jnp.arange(len(tokens), dtype=jnp.int32)[None])

    @jax.jit
    def logits(tokens: jax.Array, pools: Any, *place: jax.Array) -> jax.Array:
        return target.logits(target(tokens, pools, Place(*place, PAGE_SIZE)).hidden)

    return np.asarray(logits(jnp.asarray(tokens)[None], pools, *place)[0])


def test_plain_greedy_is_the_argmax_of_one_whole_pass(target: Decoder) -> None:
    ids, steps = answer(target, None, 40, rows=1)
    logits = teacher(target, ids)
    assert ids == logits[len(PROMPT) - 1 : -1].argmax(axis=-1).tolist()
    assert steps == 40
    assert len(set(ids)) > 8  # an answer that repeats one token would prove little


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["random", "convolution", "oracle", "hostile", "half right"])
def test_same_tokens_with_any_drafter(target: Decoder, kind: str, options: dict[str, float]) -> None:
    plain, _ = answer(target, None, 50, rows=1, options=options)
    script = script_of(plain)
    drafter = {
        "random": lambda: tiny_drafter(),
        "convolution": lambda: tiny_drafter(config=dataclasses.replace(DRAFTER, convolution_group=16)),
        "oracle": lambda: ScriptedDrafter(target, script),
        "hostile": lambda: ScriptedDrafter(target, [(token + 1) % VOCABULARY for token in script]),
        "half right": lambda: ScriptedDrafter(target, [t if p % 5 else 0 for p, t in enumerate(script)]),
    }[kind]()
    ids, steps = answer(target, drafter, 50, options=options)
    assert ids == plain
    if kind == "oracle":
        assert steps == 4  # 16 + 16 + 16 + 2
    if kind == "hostile":
        assert steps == 50


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gemma4_experts", "gemma4_per_layer"])
@pytest.mark.slow
def test_same_tokens_in_every_family(goldens: Path, name: str) -> None:
    """Windows, experts, layers that share K and V: 50 tokens beyond a window of 8, sampled, for variety."""
    checkpoint = checkpoints.load(goldens / name)
    assert isinstance(checkpoint.config, ModelConfig)
    target = Decoder(checkpoint.config, checkpoint.parameters, dtype=F32)
    prompt = PROMPT % checkpoint.config.vocab_size
    config = dataclasses.replace(
        DRAFTER,
        hidden_size=checkpoint.config.hidden_size,
        vocab_size=checkpoint.config.vocab_size,
        num_target_layers=checkpoint.config.num_layers,
    )
    asked: dict[str, Any] = {"options": SAMPLED, "prompt": prompt}
    plain, _ = answer(target, None, 50, rows=1, **asked)
    assert len(set(plain)) > 8
    assert answer(target, tiny_drafter(config=config), 50, **asked)[0] == plain
    ids, steps = answer(target, ScriptedDrafter(target, prompt.tolist() + plain, config), 50, **asked)
    assert ids == plain
    if checkpoint.config.final_softcap is None:  # under a cap of 3 no drafter can speak louder than the noise
        assert steps == 4


@pytest.mark.parametrize("rows", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(16, marks=pytest.mark.slow)])
def test_plain_steps_give_the_same_tokens_with_any_number_of_rows(target: Decoder, rows: int) -> None:
    assert answer(target, None, 30, rows=rows)[0] == answer(target, None, 30, rows=1)[0]


@pytest.mark.parametrize("rows", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_short_verify(target: Decoder, rows: int) -> None:
    plain, _ = answer(target, None, 33, rows=1)
    ids, steps = answer(target, ScriptedDrafter(target, script_of(plain)), 33, rows=rows)
    assert ids == plain
    assert steps == -(-33 // rows)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 8, 12])
def test_short_blocks_with_a_convolution(target: Decoder, rows: int) -> None:
    drafter = tiny_drafter(config=dataclasses.replace(DRAFTER, convolution_group=16, path_rank=8))
    assert answer(target, drafter, 33, rows=rows)[0] == answer(target, None, 33, rows=1)[0]


def test_stop_token_ends_the_answer_in_the_middle_of_a_block(target: Decoder) -> None:
    plain, _ = answer(target, None, 30, rows=1)
    stop = next(token for index, token in enumerate(plain) if index > 5 and token not in plain[:index])
    expected = plain[: plain.index(stop) + 1]
    assert answer(target, None, 30, rows=1, stop_ids=(stop,))[0] == expected
    assert answer(target, ScriptedDrafter(target, script_of(plain)), 30, stop_ids=(stop,))[0] == expected


def test_limit_cuts_a_block(target: Decoder) -> None:
    plain, _ = answer(target, None, 30, rows=1)
    for limit in (1, 15, 17):
        assert answer(target, ScriptedDrafter(target, script_of(plain)), limit)[0] == plain[:limit]


def test_a_gap_before_the_answer_moves_positions_but_not_pages(target: Decoder) -> None:
    """With original positions a pruned prompt's answer stands far to the right of where its KV is."""
    plain, _ = answer(target, None, 20, rows=1, first_position=90)
    near, _ = answer(target, None, 20, rows=1)
    assert plain != near
    assert answer(target, tiny_drafter(), 20, first_position=90)[0] == plain


def test_slots_do_not_disturb_each_other(target: Decoder) -> None:
    """Two sequences in one step get the tokens that each gets alone."""
    alone, _ = answer(target, None, 12, rows=4)
    networks = (*nnx.split(target), *nnx.split(None))
    pools = Pools(empty_pools(TARGET, num_pages=2 * PAGES + 1, page_size=PAGE_SIZE, dtype=F32), ())
    table = jnp.arange(1, 2 * PAGES + 1, dtype=jnp.int32).reshape(2, PAGES)
    prompts = jnp.stack([PROMPT, PROMPT[::-1]])
    positions = jnp.tile(jnp.arange(len(PROMPT) - 1, dtype=jnp.int32), (2, 1))

    def both(*values: int) -> jax.Array:
        return jnp.asarray(values, jnp.int32)

    pools = _read(*networks, pools, prompts[:, :-1], positions, table, both(0, 0))
    length = len(PROMPT) - 1
    slots = Slots(
        table,
        both(length, length),
        both(length, length),
        jnp.asarray(prompts[:, -1], jnp.int32),
        both(0, 0),
        both(12, 5),
        jnp.full((2, 1), -1, jnp.int32),
        jnp.asarray([True, True]),
    )
    parameters = SamplingParameters(
        jnp.zeros(2, jnp.float32),
        both(0, 0),
        jnp.ones(2, jnp.float32),
        jnp.zeros(2, jnp.float32),
        jnp.zeros((2, 2), jnp.uint32),
    )
    visit, _, slots = _visit(*networks, pools, slots, parameters, np.int32(64), rows=4, capacity=64)
    assert np.asarray(visit.count).tolist() == [12, 5]
    assert np.asarray(visit.tokens)[0, :12].tolist() == alone
    assert dataclasses.asdict(slots)["live"].tolist() == [False, False]
