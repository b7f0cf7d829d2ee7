"""A prompt as the engine sees it: token ids, and for each token whether it is structure or what somebody said."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

Kind = Literal["structure", "content"]


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens start..end (end excluded).

    Content of a message carries its index and role; raw text and structure carry None.
    """

    start: int
    end: int
    message: int | None
    role: str | None
    kind: Kind

    def __len__(self) -> int:
        return self.end - self.start


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """`token_ids` i32[S] and spans that lie end to end over 0..S, none empty. Raises ValueError when they do not."""

    token_ids: np.ndarray
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        position = 0
        for span in self.spans:
            if span.start != position or span.end <= span.start:
                raise ValueError(f"spans must lie end to end: {span} where a span from token {position} was expected")
            position = span.end
        if position != len(self.token_ids):
            raise ValueError(f"spans cover {position} tokens of {len(self.token_ids)}; they must cover all of them")

    def __len__(self) -> int:
        return len(self.token_ids)

    def content(self, message: int | None) -> np.ndarray:
        """Indices i64[n] of the content tokens of one message; None means the text of a prompt without messages."""
        ranges = [np.arange(s.start, s.end) for s in self.spans if s.kind == "content" and s.message == message]
        return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)


def spans_from_labels(labels: np.ndarray, roles: dict[int, str]) -> tuple[Span, ...]:
    """Runs of equal labels i[S] as spans.

    Label -1 is structure, label m >= 0 is content of message m, said by roles[m].
    """
    if len(labels) == 0:
        return ()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(labels)) + 1])
    ends = np.concatenate([starts[1:], [len(labels)]])
    spans = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        label = int(labels[start])
        if label < 0:
            spans.append(Span(start, end, None, None, "structure"))
        else:
            spans.append(Span(start, end, label, roles[label], "content"))
    return tuple(spans)
