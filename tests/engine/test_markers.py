"""Markup in an answer is told of by token, with its place in the text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers

from dflash_jax.compress.spans import Prompt
from dflash_jax.engine.answer import Answer, Job
from dflash_jax.engine.request import Marker, Sampling, TextDelta
from dflash_jax.engine.tokenizer import Tokenizer


def tokenizer() -> Tokenizer:
    words = ["<unk>", "a", "b", "<0xC3>", "<0xA9>"]
    model = tokenizers.models.BPE({word: id for id, word in enumerate(words)}, [], unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    backend.add_special_tokens([tokenizers.AddedToken("<|call|>", normalized=False), "<|end|>"])
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in ("<think>", "  ")])
    return Tokenizer(backend.to_str())


A, B, E_ACUTE, CALL, END, THINK, SPACES = 1, 2, (3, 4), 5, 6, 7, 8


def events(*visits: list[int], stop: tuple[str, ...] = ()) -> list[TextDelta]:
    found: list[Any] = []
    prompt = Prompt(np.zeros(0, np.int32), ())
    job = Job(prompt, Sampling(stop=stop), max_tokens=99, seed=0, session=None, on_event=found.append)
    answer = Answer(job, SimpleNamespace(tokenizer=tokenizer(), stop_ids=(END,)))  # type: ignore[arg-type]
    for tokens in visits:
        answer._emit(np.asarray(tokens, np.int32))
    answer.finish("stop")
    return found[:-1]


def test_markers_have_places_over_all_visits() -> None:
    first, second = events([A, THINK, B, SPACES], [CALL, A, THINK])
    assert (first.text, first.markers) == ("a<think>b  ", (Marker(1, "<think>", False),))
    assert (second.text, second.markers) == ("a<think>", (Marker(11, "<|call|>", True), Marker(12, "<think>", False)))


def test_the_token_that_ends_an_answer_is_no_marker() -> None:
    (only,) = events([A, END])
    assert (only.text, only.markers) == ("a", ())


def test_a_marker_may_be_ahead_of_text_that_a_stop_string_holds_back() -> None:
    first, second = events([A, CALL, B], stop=("ac", "bc"))
    assert (first.text, first.markers) == ("a", (Marker(1, "<|call|>", True),))
    assert (second.text, second.markers) == ("b", ())


def test_a_marker_after_half_a_character_stands_after_its_replacement() -> None:
    (only,) = events([A, E_ACUTE[0], THINK, *E_ACUTE])
    assert only.text == "a\ufffd<think>\u00e9"
    assert only.markers == (Marker(2, "<think>", False),)
