"""DFlash on and off through the whole engine: tools/check_equality.py finds the same greedy tokens, and differences."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import checkpoints
from dflash_jax.bench.report import read_prompts
from dflash_jax.engine.loading import load_model
from dflash_jax.speculate import step
from dflash_jax.speculate.draw import Drawn, draw
from tests.tiny import tiny_model
from tools.check_equality import KINDS, compare

pytestmark = pytest.mark.slow

WINDOW = 128


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Answers that end at the window's end, with 1 token left and more, and at 40 tokens."""
    prompts = ["y" * (WINDOW - left) for left in (1, 2, 3, 15, 16, 17, 33)] + ["Say something.", "z" * WINDOW]
    model = tiny_model(context_length=WINDOW)
    return list(compare(model, prompts, tokens=40, kinds=KINDS[1:], ignore_eos=True, lengths=[(16,)], warm_up=False))


def test_tokens_are_equal_up_to_every_end(rows: list[dict[str, Any]]) -> None:
    assert [row["drafter"] for row in rows] == list(KINDS[1:])
    for row in rows:
        assert (row["prompts"], row["new_tokens"]) == (8, 1 + 2 + 3 + 15 + 16 + 17 + 33 + 40), "one prompt has no room"
        assert row["different"] == [], row["drafter"]


def test_drafters_are_what_they_are_called(rows: list[dict[str, Any]]) -> None:
    accepted = {row["drafter"]: row["accept_length"] for row in rows}
    assert accepted["right"] > 8
    assert 3 < accepted["half right"] < 5
    assert accepted["wrong"] == accepted["beyond the vocabulary"] == 1.0


def test_a_difference_is_found_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gullible(logits: Any, sampling: Any, number: Any, proposals: Any, recent: Any) -> Drawn:
        drawn = draw(logits, sampling, number, proposals, recent)
        taken = drawn.tokens.at[:, 0].set(proposals[:, 0]) if proposals.shape[1] else drawn.tokens
        return dataclasses.replace(drawn, tokens=taken)

    monkeypatch.setattr(step, "draw", gullible)
    asked: dict[str, Any] = {"tokens": 12, "kinds": ["stop tokens"], "lengths": [(16,)], "warm_up": False}
    (row,) = compare(tiny_model(context_length=WINDOW), ["Say something."], **asked)
    assert (row["equal_tokens"], row["equal_prompts"]) == (False, 0)
    (difference,) = row["different"]
    assert (difference["token"], difference["dflash"]) == (0, [257])
    assert difference["plain"] != [257]
    assert difference["logprob_gap"] > 0


def test_the_real_model(default_model: Path) -> None:
    """SmolLM2: w8 products are exact integers on a CPU, so its tokens do not depend on the number of rows."""
    model = load_model(default_model, drafter=checkpoints.default_drafter())
    asked: dict[str, Any] = {"kinds": ["own"], "lengths": [(16,)], "context_length": 512, "warm_up": False}
    for row in compare(model, read_prompts(None)[:2], tokens=24, **asked):
        assert row["different"] == []
        assert row["accept_length"] > 1.5
