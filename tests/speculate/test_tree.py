"""Answers with trees are plain decoding's with every drafter and model, and pools hold what they would hold."""

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
from checkpoints.random_models import random_drafter
from dflash_jax.models.config import ModelConfig
from dflash_jax.models.decoder import Decoder, Place, empty_pools
from dflash_jax.models.drafter import Drafter, empty_drafter_pools
from dflash_jax.models.layers import dense
from dflash_jax.speculate.loop import Visit, decode, prefill
from dflash_jax.speculate.path import CANDIDATES
from dflash_jax.speculate.sampling import SamplingParameters, lifted
from dflash_jax.speculate.step import Networks, Pools, Slots
from dflash_jax.speculate.tree import choose_tree
from tests.speculate.test_loop import GREEDY, PROMPT, SAMPLED, answer
from tests.speculate.test_sampling import parameters
from tests.tiny import (
    DRAFTER,
    F32,
    LONGEST_SCRIPT,
    PAGE_SIZE,
    VOCABULARY,
    ScriptedDrafter,
    padded,
    tiny_drafter,
    tiny_target,
)


def test_nodes_are_the_likeliest_paths_over_the_selectors_scores() -> None:
    target, rows, levels = tiny_target(), 12, 5
    selector = tiny_drafter(config=dataclasses.replace(DRAFTER, path_rank=8)).path
    assert selector is not None
    selector.out.weight.set_value(200 * selector.out.weight.get_value())
    hidden = 2 * jax.random.normal(jax.random.key(4), (2, levels, DRAFTER.hidden_size))
    anchor, number = jnp.asarray([3, 250], jnp.int32), jnp.asarray([0, 4], jnp.int32)
    lift = jax.jit(lifted)
    for sampling in (parameters(2, 0.0), parameters(2, 0.8)):
        choose = jax.jit(functools.partial(choose_tree, target, selector, rows=rows))
        tree = choose(hidden, anchor, sampling, number)
        base = np.asarray(target.project(hidden))

        def children(slot: int, node: tuple[int, ...], sampling: SamplingParameters = sampling) -> dict[int, float]:
            """Log-probabilities of the candidates after a path."""
            level, before = len(node), jnp.asarray([[node[-1] if node else anchor[slot]]], jnp.int32)
            scores = target.project(selector(hidden[slot, level][None], target.embed(before)[0]))
            candidates = np.argsort(-base[slot, level], kind="stable")[:CANDIDATES]  # noqa: B023
            of_slot = jax.tree.map(lambda each: each[slot : slot + 1], sampling)
            own = lift(
                scores[:, candidates][None, None],
                jnp.asarray(candidates, jnp.int32)[None, None],
                of_slot,
                number[slot : slot + 1] + level,
            )
            return dict(zip(candidates.tolist(), np.asarray(jax.nn.log_softmax(own[0, 0, 0] / 2)), strict=True))

        for slot in range(2):
            scores: dict[tuple[int, ...], float] = {}
            open_nodes: dict[tuple[int, ...], float] = {(t,): s for t, s in children(slot, ()).items()}
            while len(scores) < rows - 1:
                node = max(open_nodes, key=lambda each: open_nodes[each])
                scores[node] = open_nodes.pop(node)
                if len(node) < levels:
                    open_nodes |= {(*node, t): scores[node] + s for t, s in children(slot, node).items()}
            paths: list[tuple[int, ...]] = [()]
            for row in range(1, rows):
                paths.append((*paths[int(tree.parents[slot, row])], int(tree.tokens[slot, row])))
            assert paths[1:] == list(scores)


class SecondChoice(nnx.Module):
    """Knows the answer, but at every `period`-th position thinks that another token is a little likelier."""

    def __init__(self, target: Decoder, script: list[int], period: int, config: Any = DRAFTER) -> None:
        self.config = config
        positions = np.arange(LONGEST_SCRIPT)
        self.script = nnx.Param(jnp.asarray(padded(script)))
        self.wrong = nnx.Param(jnp.asarray(np.where(positions % period == 0, 1.0, 0.0), jnp.float32))
        self.embedding = nnx.Param(dense(target.embedding.get_value()))

    def read(self, features: jax.Array, pools: Any, place: Place) -> Any:
        return tuple(pools)

    def __call__(self, embeddings: jax.Array, pools: Any, place: Place) -> tuple[jax.Array, Any]:
        table = self.embedding.get_value()
        directions = table / jnp.sum(jnp.square(table), axis=-1, keepdims=True)
        tokens = jnp.take(self.script.get_value(), place.positions, mode="clip")
        wrong = jnp.take(self.wrong.get_value(), place.positions, mode="clip")[:, :, None]
        other = jnp.take(directions, (tokens + 1) % table.shape[0], axis=0)
        return 60.0 * (jnp.take(directions, tokens, axis=0) + 1.1 * wrong * other), tuple(pools)


@pytest.fixture(scope="module")
def target() -> Decoder:
    return tiny_target()


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "kind", ["random", "oracle", "hostile", "half right", pytest.param("second choice", marks=pytest.mark.slow)]
)
def test_tokens_are_those_of_plain_decoding(target: Decoder, kind: str, options: dict[str, float]) -> None:
    plain, _ = answer(target, None, 60, rows=1, options=options)
    script = PROMPT.tolist() + plain
    drafter = {
        "random": lambda: tiny_drafter(),
        "oracle": lambda: ScriptedDrafter(target, script),
        "hostile": lambda: ScriptedDrafter(target, [(token + 1) % VOCABULARY for token in script]),
        "half right": lambda: ScriptedDrafter(target, [t if p % 5 else 0 for p, t in enumerate(script)]),
        "second choice": lambda: SecondChoice(target, script, 4),
    }[kind]()
    ids, steps = answer(target, drafter, 60, options=options, rows=32, tree=True)
    assert ids == plain
    chain_ids, chain_steps = answer(target, drafter, 60, options=options)
    assert chain_ids == plain
    assert steps <= chain_steps
    if kind == "oracle":
        assert steps == 4  # 16 + 16 + 16 + 12
    if kind == "second choice":
        assert steps < (0.7 if options is GREEDY else 1) * chain_steps  # one who knows the noise guesses better


class Reader(SecondChoice):
    """Proposes as its kind does, and stores the K and V that a real drafter makes of the target's features."""

    def __init__(self, target: Decoder, script: list[int], period: int) -> None:
        super().__init__(target, script, period)
        self.drafter = tiny_drafter()

    def read(self, features: jax.Array, pools: Any, place: Place) -> Any:
        return self.drafter.read(features, pools, place)


def test_pools_hold_what_plain_decoding_stores(target: Decoder) -> None:
    """Two slots, whose paths differ, on pages out of order, at positions that are not token indices."""
    table = jnp.asarray([[5, 2, 7, 4, 12, 9], [1, 8, 3, 6, 10, 11]], jnp.int32)
    prompts = jnp.asarray(np.stack([PROMPT, PROMPT[::-1]]))
    length = jnp.full(2, len(PROMPT) - 1, jnp.int32)
    zeros, ones = jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.float32)
    sampling = SamplingParameters(0 * ones, zeros, ones, 0 * ones, jnp.zeros((2, 2), jnp.uint32))
    slots = Slots(table, length, length + 9, prompts[:, -1], zeros, zeros + 30, zeros[:, None] - 1, zeros == 0)

    def run(drafter: Reader, tree: bool) -> tuple[Visit, Pools, Slots]:
        sizes = {"num_pages": 13, "page_size": PAGE_SIZE, "dtype": F32}
        pools = Pools(empty_pools(target.config, **sizes), empty_drafter_pools(DRAFTER, **sizes))
        networks: Any = Networks(target, drafter)  # type: ignore[arg-type]
        positions = jnp.tile(jnp.arange(len(PROMPT) - 1, dtype=jnp.int32), (2, 1))
        pools = prefill(networks, pools, prompts[:, :-1], positions, table, zeros, page_size=PAGE_SIZE)
        sizes = {"rows": 32 if tree else 1, "capacity": 64, "page_size": PAGE_SIZE, "tree": tree}
        return decode(networks, pools, slots, sampling, jnp.int32(40), draft=tree, **sizes)

    program = jax.jit(run, static_argnums=1)
    plain, stored, _ = program(Reader(target, [0], 3), False)
    # One script for both slots: where they are told apart by position alone, only the first one is told the truth.
    script = [0] * (len(PROMPT) + 9) + plain.tokens[0, :30].tolist()
    visit, found, after = program(Reader(target, script, 3), True)
    np.testing.assert_array_equal(visit.tokens[:, :30], plain.tokens[:, :30])
    assert int(visit.steps_by_count[0, 5:].sum()) >= 2
    assert after.length.tolist() == (length + 30).tolist()
    index = np.arange(len(PROMPT) - 1 + 30)
    for slot in range(2):
        rows = np.asarray(table)[slot, index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(stored), strict=True):
            np.testing.assert_allclose(np.asarray(one)[rows], np.asarray(other)[rows], atol=1e-4)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"path_rank": 8}, marks=pytest.mark.slow),
        pytest.param({"convolution_group": 16}, marks=pytest.mark.slow),
        {"path_rank": 8, "convolution_group": 8},
    ],
)
def test_a_drafter_with_more_parts(target: Decoder, parts: dict[str, int]) -> None:
    config = dataclasses.replace(DRAFTER, **parts)
    drafter = Drafter(config, random_drafter(config, 3), dtype=F32)
    plain, _ = answer(target, None, 40, rows=1)
    assert answer(target, drafter, 40, rows=24, tree=True)[0] == plain


@pytest.mark.slow
def test_short_trees_and_ends(target: Decoder) -> None:
    """A chain of 3, stops in the middle of a path, limits that cut one, a gap between positions and pages."""
    plain, _ = answer(target, None, 40, rows=1)
    drafter = SecondChoice(target, PROMPT.tolist() + plain, 3)
    assert answer(target, drafter, 40, rows=4, tree=True)[0] == plain
    stop = next(token for index, token in enumerate(plain) if index > 5 and token not in plain[:index])
    assert answer(target, drafter, 40, rows=32, tree=True, stop_ids=(stop,))[0] == plain[: plain.index(stop) + 1]
    for limit in (1, 2, 15, 17, 33):
        assert answer(target, drafter, limit, rows=32, tree=True)[0] == plain[:limit]
    far, _ = answer(target, None, 20, rows=1, first_position=90)
    guess = SecondChoice(target, [0] * 90 + PROMPT.tolist()[-1:] + far, 3)
    ids, steps = answer(target, guess, 20, first_position=90, rows=32, tree=True)
    assert ids == far
    assert steps < answer(target, guess, 20, first_position=90)[1]


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "gemma4",
        "gemma4_experts",
        "gemma4_per_layer",
        "llama_rope_scaled",
        "llama_window",
        "qwen2",
        "qwen3",
    ],
)
@pytest.mark.slow
def test_same_tokens_in_every_family(goldens: Path, name: str) -> None:
    """Windows smaller than a branch is deep, compact keys, experts, layers that share K and V."""
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
    plain, _ = answer(target, None, 40, rows=1, **asked)
    ids, steps = answer(
        target, SecondChoice(target, prompt.tolist() + plain, 4, config), 40, rows=32, tree=True, **asked
    )
    assert ids == plain
    if checkpoint.config.tied_embeddings and checkpoint.config.final_softcap is None:  # as the drafter expects
        assert steps <= 7  # a chain takes 10


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [5, 7])
def test_fewer_tokens_than_a_row_has_candidates(allowed: int) -> None:
    """Some of a row's candidates are the same token then, which must not become two children of one node."""
    target = tiny_target()
    target.config = dataclasses.replace(target.config, suppressed_ids=tuple(range(allowed, VOCABULARY)))
    drafter = tiny_drafter(3, dataclasses.replace(DRAFTER, path_rank=8))
    assert answer(target, drafter, 20, tree=True)[0] == answer(target, None, 20, rows=1)[0]
