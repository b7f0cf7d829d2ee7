"""Spans of a prompt: what they must cover, and how runs of labels become spans."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflash_jax.compress.spans import Prompt, Span, spans_from_labels

STRUCTURE = Span(0, 2, None, None, "structure")


def test_content_gathers_all_spans_of_a_message() -> None:
    spans = (
        STRUCTURE,
        Span(2, 4, 0, "user", "content"),
        Span(4, 5, None, None, "structure"),
        Span(5, 8, 0, "user", "content"),
        Span(8, 9, 1, "tool", "content"),
    )
    prompt = Prompt(np.arange(9, dtype=np.int32), spans)
    assert prompt.content(0).tolist() == [2, 3, 5, 6, 7]
    assert prompt.content(1).tolist() == [8]
    assert prompt.content(2).tolist() == []
    assert prompt.content(None).tolist() == []
    assert len(prompt) == 9


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ((STRUCTURE,), "cover 2 tokens of 4"),
        ((STRUCTURE, Span(2, 5, 0, "user", "content")), "cover 5 tokens of 4"),
        ((STRUCTURE, Span(3, 4, 0, "user", "content")), "from token 2 was expected"),
        ((STRUCTURE, Span(1, 4, 0, "user", "content")), "from token 2 was expected"),
        ((STRUCTURE, Span(2, 2, 0, "user", "content"), Span(2, 4, 1, "user", "content")), "end to end"),
        ((), "cover 0 tokens of 4"),
    ],
)
def test_spans_that_do_not_lie_end_to_end_are_refused(spans: tuple[Span, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompt(np.zeros(4, np.int32), spans)


def test_an_empty_prompt_has_no_spans() -> None:
    assert spans_from_labels(np.zeros(0, np.int64), {}) == ()
    assert len(Prompt(np.zeros(0, np.int32), ())) == 0


@given(st.lists(st.integers(-1, 2), max_size=40))
def test_spans_say_of_every_token_what_its_label_says(labels: list[int]) -> None:
    roles = {0: "system", 1: "user", 2: "tool"}
    spans = spans_from_labels(np.asarray(labels, np.int64), roles)
    prompt = Prompt(np.zeros(len(labels), np.int32), spans)
    said = [-1 if span.message is None else span.message for span in prompt.spans for _ in range(len(span))]
    assert said == labels
    assert all(a.message != b.message for a, b in itertools.pairwise(spans)), "runs are as long as they can be"
    for span in spans:
        assert span.kind == ("structure" if span.message is None else "content")
        assert span.role == (None if span.message is None else roles[span.message])
