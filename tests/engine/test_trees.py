"""Engines that verify trees answer as engines that decode plainly: sessions, rings, pruned prompts, penalties."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from dflash_jax.engine import profile
from dflash_jax.engine.engine import Engine
from tests.engine.test_rings import LONG, QUESTION, said, windowed_model
from tests.speculate.test_tree import SecondChoice
from tests.tiny import tiny_drafter, tiny_model

SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.4, "logprobs": 2}


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    engine = Engine(windowed_model(), dflash="off", pflash="on", keep_ratio=0.4, positions="original")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tree() -> Iterator[Engine]:
    model = windowed_model(drafted=True)
    engine = Engine(model, dflash="on", pflash="on", keep_ratio=0.4, positions="original", tree=24)
    yield engine
    engine.close()


@pytest.mark.slow
def test_conversations_with_rings_and_pruned_positions(plain: Engine, tree: Engine) -> None:
    assert tree._shared.programs.ring is not None
    chat = [{"role": "user", "content": LONG}, said("Done."), QUESTION]
    for _ in range(2):
        found, expected = (each.generate(chat, max_tokens=70, ignore_eos=True) for each in (tree, plain))
        assert found.token_ids == expected.token_ids
        chat += [said(expected.text), {"role": "user", "content": LONG[::-1][:200]}, QUESTION]
    assert found.stats.pflash is not None
    assert found.stats.cached_tokens > 0


def test_penalties_and_logprobs(plain: Engine, tree: Engine) -> None:
    found, expected = (each.generate([QUESTION], max_tokens=30, ignore_eos=True, **SAMPLED) for each in (tree, plain))
    assert found.token_ids == expected.token_ids
    assert len(found.logprobs) == len(expected.logprobs) > 0
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one.token.logprob == pytest.approx(other.token.logprob, abs=1e-4)
        assert [top.token_id for top in one.top] == [top.token_id for top in other.top]


@pytest.mark.slow
def test_answers_end_at_the_windows_end() -> None:
    """Most nodes then stand past the window; there must be pages for them all the same."""
    window = 128
    model = tiny_model(context_length=window)
    prompts = ["y" * (window - left) for left in (33, 1, 2, 3, 16, 24)]
    plain = Engine(model, dflash="off", pflash="off")
    expected = [plain.generate(prompt, ignore_eos=True) for prompt in prompts]
    plain.close()
    script = [0] * (window - 33) + list(expected[0].token_ids)
    drafter: Any = SecondChoice(model.target, script, 3)
    engine = Engine(dataclasses.replace(model, drafter=drafter), dflash="on", pflash="off", tree=32)
    found = [engine.generate(prompt, ignore_eos=True) for prompt in prompts]
    engine.close()
    assert [len(each.token_ids) for each in found] == [33, 1, 2, 3, 16, 24]
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert found[0].stats.dflash is not None
    assert found[0].stats.dflash.accept_length > 4


@pytest.mark.parametrize("rows", [-1, 1, True, 33])
def test_sizes_that_make_no_sense_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"a tree of {rows} rows: give 2 to 32"):
        Engine(tiny_model(tiny_drafter()), tree=rows)


def test_a_gpu_takes_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    gpu = profile.profile_for_device()
    assert gpu.with_tree(None).tree
    assert not gpu.with_tree(0).tree
    assert gpu.with_tree(32).block_rows == (32,)
