"""Penalties, biases and log-probabilities of one request, between its record and the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dflash_jax.engine.request import Candidate, Sampling, TokenLogprobs
from dflash_jax.engine.tokenizer import Tokenizer
from dflash_jax.speculate.logprobs import Logprobs
from dflash_jax.speculate.penalties import Penalties
from dflash_jax.speculate.sampling import Extras

_LEAST_LOGPROB = -9999.0
"""What OpenAI says for a probability of zero; JSON has no infinities and no NaN, which broken weights give."""


def extras_of(sampling: Sampling, prompt_ids: np.ndarray, vocabulary: int) -> Extras:
    """What one slot asks for at the beginning of an answer, as arrays of the host.

    The defaults of `Sampling` ask for nothing. `prompt_ids` is what the client sent, pruned or not.
    """
    bias, in_prompt = np.zeros((1, vocabulary), np.float32), np.zeros((1, vocabulary), np.bool_)
    bias[0, list(sampling.logit_bias)] = list(sampling.logit_bias.values())
    in_prompt[0, prompt_ids] = True
    penalties: dict[str, Any] = {
        "repetition": np.asarray([sampling.repetition_penalty], np.float32),
        "presence": np.asarray([sampling.presence_penalty], np.float32),
        "frequency": np.asarray([sampling.frequency_penalty], np.float32),
        "bias": bias,
        "in_prompt": in_prompt,
        "counts": np.zeros((1, vocabulary), np.int32),
    }
    asked: Any = np.asarray([sampling.asks_for_extras])
    return Extras(asked, Penalties(**penalties))


def with_answer(extras: Extras, generated: Sequence[int]) -> Extras:
    """The same extras, with the tokens of the answer so far counted."""
    vocabulary = extras.penalties.counts.shape[1]
    counts: Any = np.bincount(np.asarray(generated, np.int64), minlength=vocabulary)[None].astype(np.int32)
    return dataclasses.replace(extras, penalties=dataclasses.replace(extras.penalties, counts=counts))


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB) if math.isfinite(logprob) else _LEAST_LOGPROB


class LogprobStream:
    """Log-probabilities of an answer's tokens, told of together with their text.

    What a stop string may cut off waits until it is known whether it does.
    """

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer, self._top = tokenizer, top
        self._waiting: list[TokenLogprobs] = []

    def add(self, place: int, logprobs: Logprobs, row: int) -> None:
        """One token of a visit, read back to the host; it begins at this character of the answer."""
        ids, values = (np.asarray(part)[0, row, : 1 + self._top].tolist() for part in (logprobs.ids, logprobs.values))
        own, *others = (
            Candidate(id, self._tokenizer.token_bytes(id), _finite(value))
            for id, value in zip(ids, values, strict=True)
        )
        self._waiting.append(TokenLogprobs(own, tuple(others), place))

    def take(self, shown: int) -> tuple[TokenLogprobs, ...]:
        """Those of the first `shown` characters of the answer that have not been taken."""
        count = sum(entry.place < shown for entry in self._waiting)
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return tuple(taken)

    def rest(self) -> tuple[TokenLogprobs, ...]:
        """All that have not been taken."""
        taken, self._waiting = self._waiting, []
        return tuple(taken)
