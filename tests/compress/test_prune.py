"""From scores to kept tokens."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.compress.prune import Gate, budget, rope_positions, select

ENOUGH = {"new_tokens": 4000, "droppable": 3000, "keep_ratio": 0.25}
CHUNK, SMOOTH = 32, 13


@pytest.mark.parametrize("cost", [0.1, 5.0])
def test_a_gate_that_is_off_or_on_ignores_the_cost(cost: float) -> None:
    assert not Gate("off", cost).opens(**ENOUGH)
    assert Gate("on", cost).opens(**ENOUGH)
    assert Gate("on", cost).opens(new_tokens=70, droppable=64, keep_ratio=0.25)


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_no_gate_opens_where_nothing_can_be_won(mode: str) -> None:
    gate = Gate(mode, 0.0)  # type: ignore[arg-type]
    assert not gate.opens(**{**ENOUGH, "droppable": 63})
    assert not gate.opens(**{**ENOUGH, "keep_ratio": 1.0})


def test_auto_opens_for_long_prompts_where_more_is_saved_than_spent() -> None:
    assert Gate("auto", 0.1).opens(**ENOUGH)
    assert not Gate("auto", 0.1).opens(new_tokens=1023, droppable=1000, keep_ratio=0.1)
    assert Gate("auto", 0.1).opens(new_tokens=1024, droppable=1000, keep_ratio=0.1)
    # 3000 tokens saved of 4000 that are scored: worth it while a scored token costs less than 0.6 of a read one.
    assert Gate("auto", 0.59).opens(new_tokens=4000, droppable=4000, keep_ratio=0.25)
    assert not Gate("auto", 0.61).opens(new_tokens=4000, droppable=4000, keep_ratio=0.25)


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(100, 500))
    scores = (rng.exponential(size=(3, 512)) * np.array([[1.0], [1e-3], [10.0]])).astype(np.float32)
    runs = np.repeat(rng.random(count // 20 + 1) < 0.7, 20)[:count]
    return scores, runs, float(rng.uniform(0, 1))


@pytest.mark.parametrize("seed", range(12))
def test_selection_keeps_within_the_budget_and_all_that_may_not_be_dropped(seed: int) -> None:
    scores, droppable, keep_ratio = random_case(seed)
    kept = select(jnp.asarray(scores), droppable, keep_ratio)
    assert kept.shape == droppable.shape
    assert kept[~droppable].all()
    most = budget(int(droppable.sum()), keep_ratio)
    assert kept[droppable].sum() <= most
    assert kept[droppable].sum() > most - CHUNK, "the next chunk would still have fitted"


@pytest.mark.parametrize("seed", range(6))
def test_selection_is_that_of_its_definition(seed: int) -> None:
    """Average over 13 tokens, per-layer standardisation over droppable tokens, maximum over layers,
    then chunks by mean; the best tokens of the best chunk where not even that fits.
    """
    scores, droppable, keep_ratio = random_case(seed)
    count = len(droppable)

    def smooth(values: np.ndarray) -> np.ndarray:
        return np.convolve(values, np.ones(SMOOTH) / SMOOTH, mode="same")

    standardised = []
    for layer in scores.astype(np.float64):
        pooled = smooth(layer)
        among = pooled[:count][droppable]
        standardised.append((pooled - among.mean()) / among.std())
    pooled = smooth(np.max(standardised, axis=0))
    chunks = [np.flatnonzero(droppable[start : start + CHUNK]) + start for start in range(0, count, CHUNK)]
    ranked = sorted((chunk for chunk in chunks if len(chunk)), key=lambda chunk: -pooled[chunk].mean())
    expected, left = ~droppable, int(np.ceil(droppable.sum() * keep_ratio))
    if len(ranked[0]) > left:
        expected[sorted(ranked[0], key=lambda token: -pooled[token])[:left]] = True
    for chunk in ranked:
        if len(chunk) > left:
            break
        expected[chunk] = True
        left -= len(chunk)
    np.testing.assert_array_equal(select(jnp.asarray(scores), droppable, keep_ratio), expected)


def test_one_convinced_layer_is_enough() -> None:
    """Its scores are a thousandth of the other's, as those of a layer that spreads its attention are."""
    rng = np.random.default_rng(1)
    scores = np.stack([rng.uniform(0, 1, 640), rng.uniform(0, 1e-4, 640)]).astype(np.float32)
    scores[1, 330:345] = 1e-3
    kept = select(jnp.asarray(scores), np.ones(640, np.bool_), 0.11)
    assert kept[320:352].all()


@pytest.mark.parametrize("place", [(0, 0), (2, 150)])
def test_a_broken_score_keeps_everything(place: tuple[int, int]) -> None:
    scores, droppable, _ = random_case(0)
    scores[place] = np.nan
    assert select(jnp.asarray(scores), droppable, 0.1).all()


def test_the_ends_of_the_keep_ratio() -> None:
    scores, droppable, _ = random_case(4)
    np.testing.assert_array_equal(select(jnp.asarray(scores), droppable, 0.0), ~droppable)
    assert select(jnp.asarray(scores), droppable, 1.0).all()
    nothing = np.zeros(300, np.bool_)
    assert select(jnp.asarray(scores), nothing, 0.1).all()


def test_equal_scores_are_not_a_division_by_zero() -> None:
    kept = select(jnp.full((2, 512), 0.25, jnp.float32), np.ones(320, np.bool_), 0.5)
    assert kept.sum() == 160


def test_positions_of_kept_tokens() -> None:
    kept = np.array([True, False, False, True, True, False])
    original, compact = rope_positions(kept, "original"), rope_positions(kept, "compact")
    assert original.tolist() == [0, 3, 4]
    assert compact.tolist() == [0, 1, 2]
    assert original.dtype == compact.dtype == np.int32
