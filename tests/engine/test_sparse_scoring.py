"""Scoring by sparse attention: the same scores as dense ones when every block is kept, and a fact is found when not."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dflash_jax.bench.haystack import NEEDLES, conversation
from dflash_jax.compress.score import QUESTION_ROWS, Depth, Sparse
from dflash_jax.engine import engine as engine_module
from dflash_jax.engine.compilation import compilations
from dflash_jax.engine.engine import Engine
from dflash_jax.engine.loading import Model
from dflash_jax.engine.programs import Programs, chunks_of
from pallas_kernels.sparse_attention.api import SelectionRule
from tests.engine.test_rings import LONG, QUESTION, say, windowed, windowed_model
from tests.tiny import PAGE_SIZE, TINY_PROFILE, tiny_model, tiny_target

pytestmark = pytest.mark.slow

PROMPT = np.random.default_rng(0).integers(0, 256, 301).astype(np.int32)
RULE = SelectionRule(block_size=PAGE_SIZE)
EVERYTHING = Sparse(dataclasses.replace(RULE, alpha=0.0), least_tokens=300)
PROFILE = dataclasses.replace(TINY_PROFILE, chunks=(32,))  # fewer programs to compile
LITTLE = Sparse(dataclasses.replace(RULE, alpha=0.999, sink=1, window=1), least_tokens=300)


def scores(model: Model, sparse: Sparse | None, prompt: np.ndarray = PROMPT, start: int = 0) -> np.ndarray:
    """Of the prompt's tokens from `start` on; those before are there already."""
    sizes = {"num_pages": 25, "pages_per_sequence": 24}
    programs = Programs(model.target, None, None, Depth(3), profile=PROFILE, sparse=sparse, **sizes)
    tables, positions = programs.whole_tables(), np.arange(len(prompt) + QUESTION_ROWS, dtype=np.int32)
    for begin, end in chunks_of(start, PROFILE):
        programs.prefill_chunk(prompt[begin:end], positions[begin:end], tables, begin)
    reading = programs.begin_reading(tables, start, len(prompt))
    for begin, end in chunks_of(len(prompt) - start, PROFILE):
        rows = slice(start + begin, start + end)
        reading = programs.read_for_scoring(
            reading, prompt[rows], positions[rows], tables, start + begin, begin, len(prompt)
        )
    assert bool(reading.means) == (sparse is not None and len(prompt) >= sparse.least_tokens)
    for layer, means in programs.begin_reading(tables, len(prompt), len(prompt)).means.items():
        np.testing.assert_allclose(reading.means[layer], means, atol=1e-6)  # grown chunk by chunk as from the pages
    question = prompt[:QUESTION_ROWS]
    found = programs.score(reading, question, positions[len(prompt) :], tables, len(prompt), len(prompt) - start)
    return np.asarray(found)[:, : len(prompt) - start]


@pytest.mark.parametrize(
    ("model", "start"), [(tiny_model(), 0), (windowed_model(), 45)], ids=["all layers full", "one full and compact"]
)
def test_scores_are_those_of_dense_reading_when_every_block_is_kept(model: Model, start: int) -> None:
    dense, sparse = scores(model, None, start=start), scores(model, EVERYTHING, start=start)
    np.testing.assert_allclose(sparse, dense, rtol=1e-4, atol=1e-7)
    little = scores(model, LITTLE, start=start)
    assert np.isfinite(little).all()
    assert np.abs(little[-1] / dense[-1] - 1).max() > 0.02


def test_short_prompts_are_read_densely() -> None:
    model = tiny_model()
    strict = dataclasses.replace(LITTLE, least_tokens=100)
    np.testing.assert_array_equal(scores(model, strict, PROMPT[:99]), scores(model, None, PROMPT[:99]))


@pytest.mark.parametrize("scored", [False, True], ids=["scores itself", "scorer of its own"])
def test_an_engine_prunes_turn_after_turn_and_compiles_nothing_late(
    scored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "Sparse", lambda: dataclasses.replace(LITTLE, least_tokens=200))
    layers = list(windowed().layers)
    config = dataclasses.replace(windowed(), layers=(layers[2], *layers[1:]))  # a full one among those that run
    scorer = tiny_target(seed=5, config=config) if scored else None
    model = dataclasses.replace(windowed_model(), target=tiny_target(config=config), scorer=scorer, profile=PROFILE)
    read: list[bool] = []

    def spy(programs: Programs, *arguments: Any) -> Any:
        reading = begin(programs, *arguments)
        read.append(bool(reading.means))
        return reading

    begin = Programs.begin_reading
    monkeypatch.setattr(Programs, "begin_reading", spy)
    with contextlib.closing(Engine(model, pflash="on", keep_ratio=0.5, max_sessions=1, bsa=True)) as engine:
        engine.warm_up()
        assert True in read
        read.clear()
        before = compilations()
        chat = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "Yes."}, QUESTION]
        answers = [say(engine, chat)]
        chat += [{"role": "assistant", "content": "So."}, {"role": "user", "content": LONG}, QUESTION]
        answers.append(say(engine, chat))
        assert read == [True, True]
        assert compilations() == before
    for answer in answers:
        assert answer.stats.pflash is not None
        assert answer.stats.pflash.kept_tokens < answer.stats.prompt_tokens


def test_a_fact_in_a_long_conversation_is_found(default_model: Path) -> None:
    needle = NEEDLES[0]
    chat = conversation(20_000, needle, depth=0.4, offset=70_000)
    with contextlib.closing(
        Engine.load(default_model, pflash="on", dflash="off", keep_ratio=0.1, max_sessions=1, bsa=True)
    ) as engine:
        assert engine.count_tokens(chat) > Sparse().least_tokens
        answer = engine.generate(chat, max_tokens=24)
    assert needle.answer in answer.text
    assert answer.stats.pflash is not None
    assert answer.stats.pflash.kept_tokens < 0.2 * answer.stats.prompt_tokens
