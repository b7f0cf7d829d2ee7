"""What a caller asks of the engine and what comes back: plain records without device values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
PflashScope = Literal["agent", "document", "all"]


class RequestError(ValueError):
    """A request that cannot be served as it stands. `code` is OpenAI's error code where it has one."""

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class EngineWarning(UserWarning):
    """An option that does not do what one may think, and that the engine goes on after."""


class OverloadedError(RuntimeError):
    """The queue is full; `retry_after` is a hint in seconds."""

    retry_after = 1


RANGES = {
    "repetition_penalty": (0.1, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "logit_bias": (-100.0, 100.0),
    "logprobs": (0, 20),
}
"""Least and greatest value of fields of `Sampling`."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off."""

    max_tokens: int | None = None
    """None means the room left in the context window."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    """None draws a fresh seed."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    """Divides the logits (multiplies negative ones) of tokens in prompt or answer."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the answer."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens in the answer, as often as they are in it."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these token ids."""
    logprobs: int | None = None
    """Tell of each token's log-probability by the model itself, and of so many of the most likely tokens."""

    @property
    def penalises(self) -> bool:
        """Whether what the answer holds changes how it goes on."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def asks_for_extras(self) -> bool:
        """Whether rows need more than temperature and filters."""
        return self.penalises or bool(self.logit_bias) or self.logprobs is not None

    def check(self, vocabulary: int) -> None:
        """Raises RequestError for a penalty, a bias or a number of log-probabilities that is out of range."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            values = value.values() if isinstance(value, Mapping) else () if value is None else (value,)
            for number in values:
                if not least <= number <= most:
                    raise RequestError(f"{name} must be from {least:g} to {most:g}, not {number}", param=name)
        unknown = [token for token in self.logit_bias if not 0 <= token < vocabulary]
        if unknown:
            raise RequestError(
                f"logit_bias has the token id {unknown[0]}: this model's are 0 to {vocabulary - 1}", param="logit_bias"
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """One generation. Exactly one of `messages` (chat template) and `prompt` (raw text) is set."""

    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    sampling: Sampling = Sampling()
    session: str | None = None
    """A hint that names the conversation; without it the longest known prefix decides."""
    template_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the chat template itself, such as enable_thinking."""
    continue_final: bool = False
    """Whether the answer goes on from the last message, which is the assistant's."""
    answer_start: Callable[[str], str] | None = None
    """Gives the text that the answer starts with, markup recognised, by the last characters of the prompt.

    It counts as prompt, and no event tells of it.
    """


@dataclasses.dataclass(frozen=True)
class PflashStats:
    """What pruning did to the tokens of a prompt that are new; what was decided about earlier ones stays.

    `keep_ratio` is the controller's ratio for the new spans.
    """

    scored_tokens: int
    kept_tokens: int
    keep_ratio: float
    score_ms: float


@dataclasses.dataclass(frozen=True)
class DflashStats:
    """What drafting did; `accept_length` is committed tokens per verify step, bonus included."""

    verify_steps: int
    committed_tokens: int
    steps_by_count: tuple[int, ...] = ()
    """Entry c: how many steps committed c tokens."""

    @property
    def accept_length(self) -> float:
        """Committed tokens per verify step; 0 when nothing was verified."""
        return self.committed_tokens / self.verify_steps if self.verify_steps else 0.0


@dataclasses.dataclass(frozen=True)
class Stats:
    """Figures of one finished generation. Times are seconds from the moment the request was submitted."""

    prompt_tokens: int
    """What the client sent, before pruning."""
    cached_tokens: int
    """Prompt tokens that needed no prefill."""
    completion_tokens: int
    time_to_first_token: float
    total_time: float
    decode_time: float = 0.0
    """Seconds from the end of prefill to the last token."""
    pflash: PflashStats | None = None
    """None when nothing of this prompt was scored."""
    dflash: DflashStats | None = None
    """None when no block was drafted."""

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens of the answer per second after prefill."""
        return self.completion_tokens / self.decode_time if self.decode_time > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Marker:
    """A token of markup in an answer: special tokens, and added ones such as <tool_call>.

    What a model spells out with ordinary tokens is never one. A hidden marker is not part of the answer's text.
    """

    place: int
    """Characters of the whole answer before it."""
    text: str
    hidden: bool


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A token that may stand at some place, and the logarithm of its probability there."""

    token_id: int
    token_bytes: bytes
    """What it adds to a text: not always whole characters."""
    logprob: float


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """A token of the answer, and the most likely tokens at its place, best first."""

    token: Candidate
    top: tuple[Candidate, ...]
    place: int
    """Characters of the whole answer before it."""


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """Newly generated text and its token ids.

    The text may be empty while a stop string or a UTF-8 character is incomplete. Markers may be ahead of the text;
    log-probabilities, if they were asked for, come with the text.
    """

    text: str
    token_ids: tuple[int, ...]
    markers: tuple[Marker, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last event of a generation. `error` says what went wrong when `reason` is "error"."""

    reason: FinishReason
    stats: Stats
    error: str | None = None


Event = TextDelta | Finished


@dataclasses.dataclass(frozen=True)
class Result:
    """A whole generation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the tokens of the text, if they were asked for."""
