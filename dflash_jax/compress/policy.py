"""What PFlash may drop from a prompt, decided from who said it; what it does drop is the scorer's affair."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from dflash_jax.compress.spans import Prompt

Scope = Literal["agent", "document", "all"]

BIG_MESSAGE = 64
"""Scope `agent` leaves messages alone whose content is shorter than this: pruning them saves nothing and loses much."""
QUESTION_TAIL = 64
"""Scope `all` keeps this many tokens at the end of the last user message: the question."""


def droppable(prompt: Prompt, scope: Scope) -> np.ndarray:
    """Which tokens may be dropped, bool[S]. Structure tokens never are.

    agent     tool results anywhere, and user and assistant turns before the last user message; each only if big
    document  all content except the last user message
    all       all content except the last QUESTION_TAIL tokens of the last user message

    A prompt of raw text has no messages: scope `all` keeps its last QUESTION_TAIL tokens, other scopes keep everything.
    Raises ValueError for an unknown scope.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"unknown scope {scope!r}: expected one of {', '.join(get_args(Scope))}")
    mask = np.zeros(len(prompt), np.bool_)
    question = _last_user(prompt)
    for message, role in _messages(prompt).items():
        tokens = prompt.content(message)
        if scope == "all":
            mask[tokens] = True
        elif message is None:
            continue
        elif scope == "document":
            mask[tokens] = message != question
        else:
            old_turn = question is not None and message < question and role in ("user", "assistant")
            mask[tokens] = len(tokens) >= BIG_MESSAGE and (role == "tool" or old_turn)
    if scope == "all":
        mask[_question_indices(prompt, QUESTION_TAIL)] = False
    return mask


def question_tokens(prompt: Prompt, limit: int) -> np.ndarray | None:
    """Ids i32[n] of the last `limit` content tokens of the last user message, or None when there is no such message."""
    question = _last_user(prompt)
    if question is None or limit <= 0:
        return None
    return prompt.token_ids[prompt.content(question)[-limit:]]


def _messages(prompt: Prompt) -> dict[int | None, str | None]:
    return {span.message: span.role for span in prompt.spans if span.kind == "content"}


def _last_user(prompt: Prompt) -> int | None:
    return max((m for m, role in _messages(prompt).items() if m is not None and role == "user"), default=None)


def _question_indices(prompt: Prompt, limit: int) -> np.ndarray:
    question = _last_user(prompt)
    if question is not None:
        return prompt.content(question)[-limit:]
    # Nobody asked: the end of whatever stands last is the best guess at what matters now.
    last = [span for span in prompt.spans if span.kind == "content"][-1:]
    return np.concatenate([prompt.content(span.message)[-limit:] for span in last]) if last else np.zeros(0, np.int64)
