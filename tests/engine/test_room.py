"""What an engine reserves, by what the device's memory holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest
from flax import nnx

from checkpoints.fit import kv_cost
from dflash_jax.bench.shapes import TARGETS
from dflash_jax.engine.engine import Engine, EngineWarning
from dflash_jax.engine.profile import profile_for_device
from dflash_jax.engine.room import NoRoom, Reserved, reserve, weight_bytes
from dflash_jax.models.hf_config import from_hf
from tests.tiny import DRAFTER, tiny_model

WANTED = Reserved(1000, 4)


def per_token(tokens: int) -> int:
    return 10 * tokens


def fit(free: int | None, *, beside: int = 1, sessions: bool = True, context: bool = True) -> Reserved:
    return reserve(
        WANTED, per_token, free, beside=lambda tokens: beside * per_token(tokens), sessions=sessions, context=context
    )


def test_what_fits_is_reserved_as_it_was_wanted() -> None:
    assert fit(None) == WANTED
    assert fit(60_000) == WANTED  # 0.9 of it are 5.4 windows
    assert fit(50_000) == Reserved(1000, 3)
    assert fit(50_000, beside=0) == WANTED


def test_fewer_answers_come_before_a_shorter_window() -> None:
    assert fit(24_000) == Reserved(1000, 1)
    assert fit(20_000) == Reserved(900, 1)
    assert fit(20_000, sessions=False) == Reserved(360, 4)


def test_what_was_asked_for_is_not_lowered() -> None:
    with pytest.raises(NoRoom, match="4 answers at a time with a context of 1,000 tokens"):
        fit(20_000, sessions=False, context=False)
    with pytest.raises(NoRoom):
        fit(20_000, context=False)
    with pytest.raises(NoRoom, match="choose a smaller --context-length"):
        fit(0)


def test_bytes_of_a_sequence_are_those_of_its_pools() -> None:
    config = from_hf(TARGETS["gemma4-31b"])
    alone = kv_cost(config, None, 2).bytes_of(131_072)
    assert alone == 2 * 131_072 * sum(config.kv_numbers(layer) for layer in config.layers)
    ring = profile_for_device().ring(config, 131_072 // profile_for_device().page_size)
    assert ring is not None
    with_ring = kv_cost(config, ring, 2).bytes_of(131_072)
    full = 2 * 131_072 * sum(config.kv_numbers(layer) for layer in config.layers if layer.window is None)
    assert full < with_ring < 1.5 * full
    drafted = 4 * 100 * 2 * DRAFTER.num_layers * DRAFTER.num_kv_heads * DRAFTER.head_dim
    assert kv_cost(DRAFTER, None, 4).bytes_of(100) == drafted


def test_weights_are_counted_with_embedding_and_head() -> None:
    target = tiny_model().target
    assert weight_bytes(target, None) == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(target)))


@pytest.mark.slow
def test_an_engine_takes_what_its_device_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    whole = Engine(model)
    assert whole.context_length == model.target.config.context_length
    monkeypatch.setattr("dflash_jax.engine.engine.free_bytes", lambda weights: 300_000)
    with pytest.warns(EngineWarning, match="the device's memory holds 1 of 2 answers"):
        small = Engine(model)
    assert 0 < small.context_length <= whole.context_length
    result = small.generate("abc", max_tokens=5, ignore_eos=True)
    assert result.token_ids == whole.generate("abc", max_tokens=5, ignore_eos=True).token_ids
    for engine in (whole, small):
        engine.close()


@pytest.mark.parametrize("own_scorer", [False, True])
def test_what_scoring_a_prompt_takes_is_reserved(own_scorer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of a prompt of 131,072 tokens are 7 GB for a 31B model: more than what its pools leave."""
    asked = {}

    def reserve_all(wanted: Reserved, bytes_of: Any, free: int | None, *, beside: Any, **_: bool) -> Reserved:
        asked["beside"], asked["answer"] = beside(wanted.context_length), bytes_of(wanted.context_length)
        return wanted

    monkeypatch.setattr("dflash_jax.engine.engine.reserve", reserve_all)
    model = tiny_model()
    model = dataclasses.replace(model, scorer=tiny_model().target) if own_scorer else model
    engine = Engine(model, pflash="on")
    programs = engine._shared.programs
    keys = programs.begin_reading(programs.scorer_tables(), 0, 1).keys
    buffers = sum(key.nbytes for key in keys)
    pages = 1 + programs.pages_per_sequence
    pools = sum(leaf.nbytes * (pages - 1) // pages for leaf in jax.tree.leaves(programs._scorer_pools))
    assert (pools > 0) == own_scorer
    assert asked["beside"] == asked["answer"] + buffers + pools
    engine.close()
    Engine(model, pflash="off").close()
    assert asked["beside"] == 0
