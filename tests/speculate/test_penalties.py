from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from dflash_jax.speculate.logprobs import TOP, logprobs_of
from dflash_jax.speculate.penalties import Penalties, count, penalise


def penalties(
    prompt: list[int], *, repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0, **bias: float
) -> Penalties:
    """One slot with a vocabulary of five; `t3=1.0` is a bias of token 3."""
    in_prompt = np.zeros((1, 5), np.bool_)
    in_prompt[0, prompt] = True
    return Penalties(
        repetition=jnp.asarray([repetition], jnp.float32),
        presence=jnp.asarray([presence], jnp.float32),
        frequency=jnp.asarray([frequency], jnp.float32),
        bias=jnp.asarray([[bias.get(f"t{token}", 0.0) for token in range(5)]], jnp.float32),
        in_prompt=jnp.asarray(in_prompt),
        counts=jnp.zeros((1, 5), jnp.int32),
    )


def penalised(logits: list[float], wanted: Penalties, answer: list[int]) -> list[float]:
    counts = count(wanted.counts, jnp.asarray([[*answer, -1]], jnp.int32))
    return np.asarray(penalise(jnp.asarray([logits], jnp.float32), wanted, counts))[0].tolist()


def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_answer() -> None:
    # As RepetitionPenaltyLogitsProcessor: tokens 0 and 1 are in the prompt, 1 and 3 in the answer.
    found = penalised([4.0, -4.0, 4.0, 0.0, -4.0], penalties([0, 1], repetition=2.0), [1, 3])
    assert found == [2.0, -8.0, 4.0, 0.0, -4.0]


def test_presence_and_frequency_are_of_the_answer_alone() -> None:
    # OpenAI: mu[j] - c[j] * frequency - (c[j] > 0) * presence
    found = penalised([1.0] * 5, penalties([0, 1], presence=0.5, frequency=0.25), [1, 3, 3, 3])
    assert found == [1.0, 0.25, 1.0, -0.25, 1.0]


def test_the_bias_comes_before_the_repetition_penalty() -> None:
    assert penalised([1.0] * 5, penalties([2], repetition=2.0, t2=5.0, t4=-100.0), []) == [1.0, 1.0, 3.0, 1.0, -99.0]


def test_what_asks_for_nothing_changes_no_bit() -> None:
    logits = [*np.random.default_rng(0).standard_normal(4).astype(np.float32).tolist(), -np.inf]
    assert penalised(logits, penalties([0, 3, 4]), [1, 1, 4]) == logits


def test_logprobs_are_normalised_and_sorted() -> None:
    logits = np.random.default_rng(1).standard_normal((2, 30)).astype(np.float32)
    tokens = np.asarray([7, 29], np.int32)
    found = logprobs_of(jnp.asarray(logits), jnp.asarray(tokens))
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    for slot in range(2):
        best = np.argsort(-expected[slot])[:TOP]
        np.testing.assert_array_equal(found.ids[slot, 0], [tokens[slot], *best])
        np.testing.assert_allclose(found.values[slot, 0], expected[slot, [tokens[slot], *best]], rtol=1e-5)
