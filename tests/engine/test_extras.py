"""Penalties, biases and log-probabilities through the whole engine, beside one plain pass of the target."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dflash_jax.engine.engine import Engine
from dflash_jax.engine.extras import LogprobStream
from dflash_jax.engine.request import RANGES, RequestError, Result
from dflash_jax.engine.target import Target
from dflash_jax.speculate.logprobs import TOP, Logprobs
from tests.tiny import ScriptedDrafter, tiny_drafter, tiny_model, tiny_tokenizer

CHAT = [{"role": "user", "content": "Say something."}]
PROMPT = tiny_tokenizer().encode("<|im_start|>user\nSay something.<|im_end|>\n<|im_start|>assistant\n").tolist()
EVERYTHING: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {11: 0.5, 257: -100.0},
}
ASKED: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 1.0},
    "frequency": {"frequency_penalty": 0.7},
    "negative frequency": {"frequency_penalty": -0.02},
    "bias": {"logit_bias": {5: 1.0, 9: 1.1, 71: -100.0}},
    "all": EVERYTHING,
}


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    engine = Engine(tiny_model(), dflash="off", pflash="off")
    engine.warm_up()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def drafting() -> Iterator[Engine]:
    """An engine that always drafts, with a drafter that is seldom right."""
    engine = Engine(tiny_model(tiny_drafter()), dflash="on", pflash="off")
    engine.warm_up()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model().target)


def ask(engine: Engine, **asked: Any) -> Result:
    return engine.generate(CHAT, max_tokens=40, ignore_eos=True, **asked)


def raw_logits(target: Target, answer: Result) -> np.ndarray:
    """f32[40, vocab]: what the target says before each token of an answer, in one pass."""
    ids = np.asarray([PROMPT + list(answer.token_ids)], np.int32)
    return np.asarray(target.logits(ids)[0, len(PROMPT) - 1 : -1])  # type: ignore[arg-type]


def penalised(logits: np.ndarray, answer: list[int], asked: dict[str, Any]) -> np.ndarray:
    """The definition, token by token."""
    scores = logits.astype(np.float64)
    for token, bias in asked.get("logit_bias", {}).items():
        scores[token] += bias
    repetition = asked.get("repetition_penalty", 1.0)
    for token in {*PROMPT, *answer}:
        scores[token] = scores[token] * repetition if scores[token] < 0 else scores[token] / repetition
    for token in set(answer):
        scores[token] -= asked.get("presence_penalty", 0.0)
        scores[token] -= asked.get("frequency_penalty", 0.0) * answer.count(token)
    return scores


@pytest.mark.parametrize("name", ASKED)
def test_greedy_tokens_are_the_argmax_of_what_the_definition_says(plain: Engine, target: Target, name: str) -> None:
    answer = ask(plain, **ASKED[name])
    logits, ids = raw_logits(target, answer), list(answer.token_ids)
    assert ids == [int(penalised(row, ids[:n], ASKED[name]).argmax()) for n, row in enumerate(logits)]
    assert ids != list(ask(plain).token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("name", ASKED)
def test_dflash_changes_no_token(plain: Engine, drafting: Engine, name: str, temperature: float) -> None:
    asked = {"temperature": temperature, "seed": 5, "top_p": 0.95, **ASKED[name]}
    assert ask(drafting, **asked).token_ids == ask(plain, **asked).token_ids


def test_blocks_that_are_right_are_accepted_whole_under_penalties(plain: Engine) -> None:
    """Rows see the block's own tokens before them: a block may be accepted only if they do."""
    expected = ask(plain, logprobs=3, **EVERYTHING)
    script = [0] * len(PROMPT) + list(expected.token_ids)
    engine = Engine(tiny_model(ScriptedDrafter(tiny_model().target, script)), dflash="on", pflash="off")
    found = ask(engine, logprobs=3, **EVERYTHING)
    engine.close()
    assert found.token_ids == expected.token_ids
    assert found.stats.dflash is not None
    assert found.stats.dflash.verify_steps == 3
    assert [entry.token.token_id for entry in found.logprobs] == list(found.token_ids)
    np.testing.assert_allclose(
        [entry.token.logprob for entry in found.logprobs],
        [entry.token.logprob for entry in expected.logprobs],
        rtol=1e-4,
    )


@pytest.mark.parametrize("asked", [{}, EVERYTHING, {"temperature": 1.5, "seed": 3, "top_k": 20}])
def test_logprobs_are_the_models_own(drafting: Engine, target: Target, asked: dict[str, Any]) -> None:
    answer = ask(drafting, logprobs=4, **asked)
    logits = raw_logits(target, answer).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert len(answer.logprobs) == 40
    for row, entry, token in zip(expected, answer.logprobs, answer.token_ids, strict=True):
        assert entry.token.token_id == token
        assert math.isclose(entry.token.logprob, row[token], rel_tol=1e-4)
        assert [one.token_id for one in entry.top] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([one.logprob for one in entry.top], np.sort(row)[::-1][:4], rtol=1e-4)


def test_logprobs_change_no_token_and_zero_means_no_alternatives(drafting: Engine) -> None:
    answer = ask(drafting, logprobs=0)
    assert answer.token_ids == ask(drafting).token_ids
    assert {entry.top for entry in answer.logprobs} == {()}
    assert ask(drafting).logprobs == ()


def test_logprobs_are_of_the_text_that_is_shown(drafting: Engine) -> None:
    whole = ask(drafting, logprobs=0)
    stop = whole.text[8:11]
    cut = ask(drafting, logprobs=0, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.logprobs == tuple(entry for entry in whole.logprobs if entry.place < len(cut.text))
    for answer in (whole, cut):
        shown = b"".join(entry.token.token_bytes for entry in answer.logprobs if entry.token.token_id < 256)
        assert shown.decode("utf-8", "replace").startswith(answer.text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logprobs_that_json_has_not_are_the_least(value: float) -> None:
    values: Any = np.full((1, 1, 3), value, np.float32)
    ids: Any = np.arange(3).reshape(1, 1, 3)
    stream = LogprobStream(tiny_tokenizer(), 2)
    stream.add(0, Logprobs(ids, values), 0)
    (entry,) = stream.rest()
    assert [one.logprob for one in (entry.token, *entry.top)] == [-9999.0] * 3


def test_a_stop_token_has_no_logprob(plain: Engine) -> None:
    answer = plain.generate(CHAT, max_tokens=9, logprobs=1, logit_bias={257: 100.0})
    assert (answer.finish_reason, answer.text, answer.logprobs) == ("stop", "", ())


def test_nothing_of_it_is_compiled_while_serving(drafting: Engine) -> None:
    before = drafting.gauges()["compilations"]
    for asked in (*ASKED.values(), {"logprobs": 20}, {"logprobs": 0, "temperature": 0.7, **EVERYTHING}, {}):
        ask(drafting, **asked)
    assert drafting.gauges()["compilations"] == before


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty must be from -2 to 2, not 2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be from -2 to 2, not nan"),
        ({"repetition_penalty": 0}, "repetition_penalty must be from 0.1 to 10, not 0"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20, not 21"),
        ({"logit_bias": {3: 101}}, "logit_bias must be from -100 to 100, not 101"),
        ({"logit_bias": {300: 1}}, "logit_bias has the token id 300: this model's are 0 to 299"),
        ({"logit_bias": {-1: 1}}, "logit_bias has the token id -1: this model's are 0 to 299"),
    ],
)
def test_values_out_of_range_are_refused(plain: Engine, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        ask(plain, **asked)
    assert str(refused.value) == message
    assert refused.value.param == next(iter(asked))


def test_a_request_may_ask_for_as_many_alternatives_as_are_looked_up() -> None:
    assert RANGES["logprobs"] == (0, TOP)
