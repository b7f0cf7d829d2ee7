"""What each scope lets PFlash drop."""

from __future__ import annotations

import numpy as np
import pytest

from dflash_jax.compress.policy import BIG_MESSAGE, QUESTION_TAIL, Scope, droppable, question_tokens
from dflash_jax.compress.spans import Prompt, Span

BIG, SMALL = BIG_MESSAGE, BIG_MESSAGE - 1
CONVERSATION = (
    ("system", 200),
    ("user", BIG),
    ("assistant", BIG + 5),
    ("tool", BIG),
    ("tool", SMALL),
    ("user", SMALL),
    ("assistant", SMALL),
    ("user", 150),
    ("assistant", BIG + 6),
    ("tool", BIG + 1),
)
LAST_USER = 7


def prompt_of(messages: tuple[tuple[str, int], ...]) -> Prompt:
    """Three structure tokens before each message's content, and two at the end."""
    spans, position = [], 0
    for index, (role, size) in enumerate(messages):
        spans += [Span(position, position + 3, None, None, "structure")]
        spans += [Span(position + 3, position + 3 + size, index, role, "content")]
        position += 3 + size
    spans.append(Span(position, position + 2, None, None, "structure"))
    return Prompt(np.arange(position + 2, dtype=np.int32), tuple(spans))


def dropped_messages(prompt: Prompt, scope: Scope) -> set[int]:
    """Messages whose whole content may be dropped; fails when something else may be."""
    mask = droppable(prompt, scope)
    assert mask.shape == (len(prompt),)
    assert mask.dtype == np.bool_
    whole = {s.message for s in prompt.spans if s.message is not None and mask[s.start : s.end].all()}
    assert mask.sum() == sum(len(prompt.content(message)) for message in whole), (
        "a message was cut or structure dropped"
    )
    return whole


def test_agent_drops_big_tool_results_and_big_old_turns() -> None:
    assert dropped_messages(prompt_of(CONVERSATION), "agent") == {1, 2, 3, 9}


def test_document_drops_everything_but_the_last_user_message() -> None:
    assert dropped_messages(prompt_of(CONVERSATION), "document") == set(range(len(CONVERSATION))) - {LAST_USER}


def test_all_keeps_the_end_of_the_last_user_message() -> None:
    prompt = prompt_of(CONVERSATION)
    mask = droppable(prompt, "all")
    question = prompt.content(LAST_USER)
    content = np.concatenate([prompt.content(index) for index in range(len(CONVERSATION))])
    expected = np.zeros(len(prompt), np.bool_)
    expected[content] = True
    expected[question[-QUESTION_TAIL:]] = False
    np.testing.assert_array_equal(mask, expected)
    assert mask[question[0]]


def test_without_a_user_message_agent_drops_tool_results_only() -> None:
    prompt = prompt_of((("system", 100), ("assistant", 100), ("tool", 100)))
    assert dropped_messages(prompt, "agent") == {2}
    assert question_tokens(prompt, 8) is None
    assert droppable(prompt, "all")[prompt.content(2)].sum() == 100 - QUESTION_TAIL


def test_plain_text_is_droppable_in_scope_all_except_its_end() -> None:
    spans = (Span(0, 1, None, None, "structure"), Span(1, 301, None, None, "content"))
    prompt = Prompt(np.arange(301, dtype=np.int32), spans)
    for scope in ("agent", "document"):
        assert not droppable(prompt, scope).any()
    mask = droppable(prompt, "all")
    assert np.flatnonzero(mask).tolist() == list(range(1, 301 - QUESTION_TAIL))


def test_nothing_of_an_empty_prompt_is_droppable() -> None:
    prompt = Prompt(np.zeros(0, np.int32), ())
    assert droppable(prompt, "all").shape == (0,)


def test_the_question_is_the_end_of_the_last_user_message() -> None:
    prompt = prompt_of(CONVERSATION)
    content = prompt.content(LAST_USER)
    ids = question_tokens(prompt, 32)
    assert ids is not None
    assert ids.tolist() == prompt.token_ids[content][-32:].tolist()
    every = question_tokens(prompt, 1000)
    assert every is not None
    assert len(every) == 150
    assert question_tokens(prompt, 0) is None


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown scope 'most': expected one of agent, document, all"):
        droppable(prompt_of(CONVERSATION), "most")  # type: ignore[arg-type]
