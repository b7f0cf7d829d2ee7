"""What the engine's tokenizer adds to the tokenizers library."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers

from dflash_jax.engine.tokenizer import GUARD, Tokenizer, TokenizerError


def tokenizer(**changes: Any) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: id for id, c in enumerate("ab<|>e\u0120")}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("<|e|>", normalized=False)])
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in ("<a>", "bb")])
    return Tokenizer(json.dumps({**json.loads(backend.to_str()), **changes}))


def test_special_tokens_can_be_read_as_text() -> None:
    found = tokenizer()
    assert found.encode("a<|e|>").tolist() == [0, 7]
    assert found.encode("a<|e|>", special=False).tolist() == [0, 2, 3, 5, 3, 4]
    assert found.encode(f"<|{GUARD}e|>", special=False).tolist() == [2, 3, 5, 3, 4]


def test_a_guard_inside_makes_a_special_token_text_and_leaves_no_trace() -> None:
    ids, offsets, text = tokenizer().encode_guarded(f"a<{GUARD}|e|> <|e|>")
    assert text == "a<|e|> <|e|>"
    assert ids.tolist() == [0, 2, 3, 5, 3, 4, 6, 7]
    assert "".join(text[start:end] for start, end in offsets) == text


def test_offsets_cover_spaces_whatever_the_file_says() -> None:
    _, offsets, _ = tokenizer().encode_guarded("a b")
    assert offsets.tolist() == [[0, 1], [1, 2], [2, 3]]


def test_markup_is_special_tokens_and_added_ones_in_brackets() -> None:
    found = tokenizer()
    assert {found.token(id) for id in found.markup_ids} == {"<|e|>", "<a>"}


@pytest.mark.parametrize("decoder", [{"type": "WordPiece", "prefix": "##", "cleanup": True}, None])
def test_a_decoder_that_cannot_stream_is_refused(decoder: Any) -> None:
    with pytest.raises(TokenizerError, match="decoder"):
        tokenizer(decoder=decoder)
