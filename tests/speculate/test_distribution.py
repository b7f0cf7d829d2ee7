"""Sampled answers have exactly the target's distribution, with any drafter.

A vocabulary of six tokens and answers of at most four, so that the probability of every answer can be written down: the
processed distributions of all prefixes, in f64 with sorts and loops. Thousands of slots answer side by side, each with
its own seed; their answers are compared with it by a chi-square test. Rules that are wrong in small ways must fail it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from checkpoints.random_models import random_target
from dflash_jax.models.config import LayerConfig, ModelConfig, RopeConfig
from dflash_jax.models.decoder import Decoder, Place, empty_pools
from dflash_jax.speculate import step
from dflash_jax.speculate.draw import Drawn
from dflash_jax.speculate.logprobs import no_logprobs
from dflash_jax.speculate.loop import decode, prefill
from dflash_jax.speculate.penalties import Penalties, count, penalise
from dflash_jax.speculate.sampling import Extras, SamplingParameters, sample
from dflash_jax.speculate.step import Networks, Pools, Slots
from tests.speculate.test_sampling import filtered
from tests.tiny import DRAFTER, F32

pytestmark = pytest.mark.slow

VOCABULARY, LONGEST, ROWS, STOP = 6, 4, 4, 5
PROMPT = (1, 3, 0)
SLOTS_EACH = 5_000
PAGE_SIZE = 16
LEAST_P = 1e-3

TARGET = ModelConfig(
    family="llama",
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_heads=2,
    layers=(LayerConfig(head_dim=8, num_kv_heads=1, mlp_width=24, attention_scale=0.35, rope=RopeConfig(theta=1e4)),),
    norm_eps=1e-5,
    context_length=64,
    tied_embeddings=False,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one request may ask for."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: tuple[float, ...] = (0.0,) * VOCABULARY


SETTINGS = {
    "plain": Setting(),
    "top-k": Setting(temperature=0.8, top_k=3),
    "top-p": Setting(temperature=1.4, top_p=0.8),
    "min-p": Setting(temperature=1.1, min_p=0.15),
    "penalties": Setting(temperature=0.9, repetition=1.5, presence=0.7, frequency=0.6),
    "biased": Setting(temperature=1.2, top_p=0.95, frequency=-0.8, bias=(0.0, 1.5, -1.0, 0.0, 0.5, -100.0)),
}


class TableDrafter(nnx.Module):
    """Proposes `table[anchor]`, whatever came before the anchor; if it is not loud, what noise makes of that."""

    def __init__(self, target: Decoder, table: np.ndarray, loudness: float = 50.0) -> None:
        assert target.head is not None
        self.config = dataclasses.replace(
            DRAFTER,
            hidden_size=16,
            vocab_size=VOCABULARY,
            block_size=ROWS,
            mask_id=2,
            target_layers=(0,),
            num_target_layers=1,
        )
        self.table = nnx.Param(jnp.asarray(table, jnp.int32))
        self.embedding = nnx.Param(target.embedding.get_value())
        # Row t is what the target's head turns into token t.
        self.hidden = nnx.Param(jnp.asarray(loudness * np.linalg.pinv(np.asarray(target.head.weight.get_value())).T))

    def read(self, features: jax.Array, pools: Any, place: Place) -> Any:
        return tuple(pools)

    def __call__(self, embeddings: jax.Array, pools: Any, place: Place) -> tuple[jax.Array, Any]:
        distance = jnp.sum((embeddings[:, :1] - self.embedding.get_value()[None]) ** 2, axis=-1)
        tokens = self.table.get_value()[jnp.argmin(distance, axis=-1)]
        return self.hidden.get_value()[jnp.pad(tokens, ((0, 0), (1, 0)))], tuple(pools)


@pytest.fixture(scope="module")
def target() -> Decoder:
    parameters = random_target(TARGET, seed=8)
    return Decoder(TARGET, {**parameters, "lm_head": 1.5 * parameters["lm_head"]}, dtype=F32)


@pytest.fixture(scope="module")
def logits(target: Decoder) -> dict[tuple[int, ...], np.ndarray]:
    """The target's logits after the prompt and every beginning of an answer, each read in one pass."""
    endings = np.asarray(list(itertools.product(range(VOCABULARY), repeat=LONGEST - 1)), np.int32)
    tokens = np.concatenate([np.tile(np.asarray(PROMPT, np.int32), (len(endings), 1)), endings], axis=1)
    pools = empty_pools(TARGET, num_pages=len(tokens) + 1, page_size=PAGE_SIZE, dtype=F32)
    positions = jnp.tile(jnp.arange(tokens.shape[1], dtype=jnp.int32), (len(tokens), 1))
    place = Place(_tables(len(tokens)), jnp.zeros(len(tokens), jnp.int32), positions, PAGE_SIZE)
    rows = np.asarray(target.logits(target(jnp.asarray(tokens), pools, place).hidden))
    found = {}
    for ending, of_rows in zip(endings.tolist(), rows, strict=True):
        for length in range(LONGEST):
            found[tuple(ending[:length])] = of_rows[len(PROMPT) - 1 + length]
    return found


def _tables(count: int) -> jax.Array:
    return 1 + jnp.arange(count, dtype=jnp.int32)[:, None]


def processed(logits: np.ndarray, setting: Setting, before: tuple[int, ...]) -> np.ndarray:
    """The distribution of the next token, in f64, one token after the other."""
    scores = logits.astype(np.float64) + np.asarray(setting.bias)
    for token in set(PROMPT) | set(before):
        scores[token] = scores[token] / setting.repetition if scores[token] > 0 else scores[token] * setting.repetition
    for token in set(before):
        scores[token] -= setting.presence + setting.frequency * before.count(token)
    return filtered(scores, setting.temperature, setting.top_k, setting.top_p, setting.min_p)


def exact(logits: dict[tuple[int, ...], np.ndarray], setting: Setting) -> dict[tuple[int, ...], float]:
    """The probability of every answer: it ends with STOP or has LONGEST tokens."""
    answers: dict[tuple[int, ...], float] = {}
    open_answers: dict[tuple[int, ...], float] = {(): 1.0}
    while open_answers:
        before, chance = open_answers.popitem()
        for token, probability in enumerate(processed(logits[before], setting, before)):
            answer = (*before, token)
            ended = token == STOP or len(answer) == LONGEST
            (answers if ended else open_answers)[answer] = chance * probability
    return answers


def parameters_of(settings: list[Setting], each: int) -> SamplingParameters:
    """Slots that ask for each of the settings in turn, every slot with its own seed."""

    def repeated(values: list[Any], dtype: Any = np.float32) -> jax.Array:
        return jnp.asarray(np.repeat(np.asarray(values, dtype), each, axis=0))

    slots = len(settings) * each
    in_prompt = np.zeros((slots, VOCABULARY), np.bool_)
    in_prompt[:, PROMPT] = True
    penalties = Penalties(
        repetition=repeated([setting.repetition for setting in settings]),
        presence=repeated([setting.presence for setting in settings]),
        frequency=repeated([setting.frequency for setting in settings]),
        bias=repeated([setting.bias for setting in settings]),
        in_prompt=jnp.asarray(in_prompt),
        counts=jnp.zeros((slots, VOCABULARY), jnp.int32),
    )
    return SamplingParameters(
        temperature=repeated([setting.temperature for setting in settings]),
        top_k=repeated([setting.top_k for setting in settings], np.int32),
        top_p=repeated([setting.top_p for setting in settings]),
        min_p=repeated([setting.min_p for setting in settings]),
        seed=jnp.stack([jnp.full(slots, 17, jnp.uint32), jnp.arange(slots, dtype=jnp.uint32)], axis=1),
        extras=Extras(jnp.ones(slots, jnp.bool_), penalties),
    )


def make_answer(target: Decoder) -> Callable[..., np.ndarray]:
    """A function (parameters, table of proposals or None) -> i32[slots, LONGEST], -1 after an answer's end."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(graph: Any, state: Any, parameters: SamplingParameters) -> tuple[jax.Array, jax.Array]:
        drafter = nnx.merge(graph, state)
        networks = Networks(target, drafter)
        slots = len(parameters.temperature)
        pools = Pools(empty_pools(TARGET, num_pages=slots + 1, page_size=PAGE_SIZE, dtype=F32), ())
        prompt = jnp.tile(jnp.asarray(PROMPT, jnp.int32), (slots, 1))
        length = jnp.full(slots, len(PROMPT) - 1, jnp.int32)
        positions = jnp.tile(jnp.arange(len(PROMPT) - 1, dtype=jnp.int32), (slots, 1))
        zeros = jnp.zeros(slots, jnp.int32)
        pools = prefill(networks, pools, prompt[:, :-1], positions, _tables(slots), zeros, page_size=PAGE_SIZE)
        start = Slots(
            page_table=_tables(slots),
            length=length,
            position=length,
            anchor=prompt[:, -1],
            number=zeros,
            limit=jnp.full(slots, LONGEST, jnp.int32),
            stop_ids=jnp.full((slots, 1), STOP, jnp.int32),
            live=jnp.ones(slots, jnp.bool_),
        )
        visit, _, _ = decode(
            networks,
            pools,
            start,
            parameters,
            jnp.int32(LONGEST),
            draft=drafter is not None,
            rows=ROWS,
            capacity=LONGEST + ROWS,
            page_size=PAGE_SIZE,
        )
        return visit.tokens[:, :LONGEST], visit.steps

    def answer(parameters: SamplingParameters, table: np.ndarray | None, **options: float) -> np.ndarray:
        drafter = None if table is None else TableDrafter(target, table, **options)
        return np.asarray(run(*nnx.split(drafter), parameters)[0])

    return answer


def p_value(answers: np.ndarray, expected: dict[tuple[int, ...], float]) -> float:
    """Of a chi-square test; answers that are expected fewer than five times count as one."""
    seen = dict.fromkeys(expected, 0)
    for row in answers.tolist():
        seen[tuple(token for token in row if token >= 0)] += 1
    wanted = {answer: chance * len(answers) for answer, chance in expected.items()}
    assert sum(seen[answer] for answer, number in wanted.items() if number == 0) == 0
    common = [answer for answer, number in wanted.items() if number >= 5]
    rare = [answer for answer, number in wanted.items() if 0 < number < 5]
    pairs = [(seen[answer], wanted[answer]) for answer in common]
    pairs.append((sum(seen[answer] for answer in rare), sum(wanted[answer] for answer in rare)))
    pairs = [(count, number) for count, number in pairs if number > 0]
    statistic = sum((count - number) ** 2 / number for count, number in pairs)
    return float(scipy.stats.chi2.sf(statistic, len(pairs) - 1))


def tables_of(logits: dict[tuple[int, ...], np.ndarray]) -> dict[str, np.ndarray | None]:
    """What each drafter proposes after each anchor."""
    likely = [logits[(anchor,)].argmax() for anchor in range(VOCABULARY)]
    unlikely = [logits[(anchor,)].argmin() for anchor in range(VOCABULARY)]
    good = [[(one := likely[anchor]), (two := likely[one]), likely[two]] for anchor in range(VOCABULARY)]
    return {
        "none": None,
        "good": np.asarray(good),
        QUIET: np.asarray(good),
        "bad": np.random.default_rng(2).integers(0, VOCABULARY, (VOCABULARY, ROWS - 1)),
        "always the least likely": np.repeat(np.asarray(unlikely)[:, None], ROWS - 1, axis=1),
        "always the end": np.full((VOCABULARY, ROWS - 1), STOP),
        "always the anchor": np.repeat(np.arange(VOCABULARY)[:, None], ROWS - 1, axis=1),
    }


QUIET = "good, in two minds"
DRAFTERS = ("none", "good", QUIET, "bad", "always the least likely", "always the end", "always the anchor")


@pytest.fixture(scope="module")
def answers(target: Decoder, logits: dict[tuple[int, ...], np.ndarray]) -> dict[str, np.ndarray]:
    """The answers of all slots with each drafter."""
    answer = make_answer(target)
    parameters = parameters_of(list(SETTINGS.values()), SLOTS_EACH)
    tables = tables_of(logits)
    return {name: answer(parameters, tables[name], **({"loudness": 2.0} if name == QUIET else {})) for name in DRAFTERS}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_answers_have_the_targets_distribution(
    answers: dict[str, np.ndarray], logits: dict[tuple[int, ...], np.ndarray], drafter: str, setting: str
) -> None:
    first = list(SETTINGS).index(setting) * SLOTS_EACH
    expected = exact(logits, SETTINGS[setting])
    assert p_value(answers[drafter][first : first + SLOTS_EACH], expected) > LEAST_P


@pytest.mark.parametrize("drafter", DRAFTERS[1:])
def test_a_seed_gives_the_same_answer_with_any_drafter(answers: dict[str, np.ndarray], drafter: str) -> None:
    np.testing.assert_array_equal(answers[drafter], answers["none"])


Rule = Callable[[jax.Array, SamplingParameters, jax.Array, jax.Array, jax.Array], jax.Array]
"""(scores of a row, parameters, number of the block's first token, row, proposals) -> the row's token."""


def drawn(
    scores: jax.Array, sampling: SamplingParameters, number: jax.Array, row: jax.Array, _: jax.Array
) -> jax.Array:
    return sample(scores, sampling, number + row)


def likely_proposals_are_taken(
    scores: jax.Array, sampling: SamplingParameters, number: jax.Array, row: jax.Array, proposal: jax.Array
) -> jax.Array:
    chance = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), jnp.maximum(proposal, 0)[:, None], axis=-1)[:, 0]
    return jnp.where((chance > 0.25) & (proposal >= 0), proposal, sample(scores, sampling, number + row))


def one_noise_for_the_block(
    scores: jax.Array, sampling: SamplingParameters, number: jax.Array, row: jax.Array, _: jax.Array
) -> jax.Array:
    return sample(scores, sampling, number)


def draw_by(rule: Rule, *, counts_rows: bool = True) -> Callable[..., Drawn]:
    """`draw` in its plainest form, with a rule in place of the draw."""

    def draw(
        logits: jax.Array, sampling: SamplingParameters, number: jax.Array, proposals: jax.Array, recent: jax.Array
    ) -> Drawn:
        assert sampling.extras is not None
        penalties = sampling.extras.penalties

        def draw_row(counts: jax.Array, each: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            row, scores, proposal = each
            token = rule(penalise(scores, penalties, counts), sampling, number, row, proposal)
            return count(counts, token[:, None]) if counts_rows else counts, token

        padded = jnp.pad(proposals, ((0, 0), (0, 1)), constant_values=-1)
        rows = (jnp.arange(ROWS, dtype=jnp.int32), logits.transpose(1, 0, 2), padded.T)
        _, tokens = jax.lax.scan(draw_row, count(penalties.counts, recent), rows)
        return Drawn(tokens.T, no_logprobs(len(number), ROWS, VOCABULARY))

    return draw


@pytest.mark.parametrize(
    ("rule", "setting", "exactly"),
    [
        (draw_by(drawn), "penalties", True),
        (draw_by(likely_proposals_are_taken), "plain", False),
        (draw_by(one_noise_for_the_block), "plain", False),
        (draw_by(drawn, counts_rows=False), "penalties", False),
    ],
    ids=["the right rule", "likely proposals are taken", "one noise for a block", "penalties do not see the block"],
)
def test_a_rule_that_is_biased_fails(
    monkeypatch: pytest.MonkeyPatch,
    target: Decoder,
    logits: dict[tuple[int, ...], np.ndarray],
    rule: Callable[..., Drawn],
    setting: str,
    exactly: bool,
) -> None:
    monkeypatch.setattr(step, "draw", rule)
    parameters = parameters_of([SETTINGS[setting]], SLOTS_EACH)
    found = make_answer(target)(parameters, tables_of(logits)["good"])
    p = p_value(found, exact(logits, SETTINGS[setting]))
    assert p > LEAST_P if exactly else p < LEAST_P**3
