"""Tokenizers from GGUF files: ids as transformers gives them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from checkpoints.errors import CheckpointError
from checkpoints.gguf_tokenizer import tokenizer_json


@pytest.fixture(scope="module")
def smollm2(default_model: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(default_model / "tokenizer.json"))


def test_ids_are_those_of_transformers(goldens: Path, smollm2: tokenizers.Tokenizer) -> None:
    cases = json.loads((goldens / "tokenizer_smollm2.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) >= 40
    found = {case["text"]: smollm2.encode(case["text"]).ids for case in cases}
    assert found == {case["text"]: case["ids"] for case in cases}


@pytest.mark.parametrize("before", [" ", "  ", "   ", "x  ", "\n\n"])
@pytest.mark.parametrize("digits", ["42", "²③", "Ⅳ٣"])
def test_every_digit_is_split_off_before_merging(smollm2: tokenizers.Tokenizer, before: str, digits: str) -> None:
    # transformers leaves this step out when it reads a GGUF file, so no golden covers it.
    parts = [before, *digits]
    assert smollm2.encode(before + digits).ids == [id for part in parts for id in smollm2.encode(part).ids]


def test_text_survives(goldens: Path, smollm2: tokenizers.Tokenizer) -> None:
    for case in json.loads((goldens / "tokenizer_smollm2.json").read_text(encoding="utf-8"))["cases"]:
        assert smollm2.decode(smollm2.encode(case["text"]).ids, skip_special_tokens=False) == case["text"]


class Field:
    """One metadata field of a GGUF file."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def contents(self) -> Any:
        return self.value


ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def fields(**changes: Any) -> dict[str, Field]:
    """A byte-level vocabulary with one merge, "a" + "b", one control token and one added token of ordinary text."""
    tokens = [*ALPHABET, "ab", "<s>", "<tool>"]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [NORMAL] * (len(tokens) - 2) + [CONTROL, USER_DEFINED],
        "merges": ["a b"],
        "bos_token_id": len(tokens) - 2,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": Field(value) for name, value in values.items() if value is not None}


def build(**changes: Any) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer_json(fields(**changes), Path("tiny.gguf")))


def pieces(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text).tokens


def test_merges_and_added_tokens() -> None:
    tokenizer = build()
    assert pieces(tokenizer, "<s>cab<tool>a") == ["<s>", "c", "ab", "<tool>", "a"]
    assert tokenizer.decode(tokenizer.encode("<s>cab<tool>a").ids, skip_special_tokens=True) == "cab<tool>a"


def test_the_beginning_is_marked_only_when_the_file_says_so() -> None:
    assert pieces(build(add_bos_token=True), "a") == ["<s>", "a"]
    assert pieces(build(add_bos_token=False), "a") == ["a"]
    assert pieces(build(), "a") == ["a"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("llama-bpe", ["123", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("gpt-2", ["1234"]),
    ],
)
def test_pre_tokenizers_group_digits_as_their_models_do(pre: str, expected: list[str]) -> None:
    merges = ["1 2", "12 3", "123 4"]
    tokens = [*ALPHABET, "12", "123", "1234"]
    tokenizer = build(pre=pre, tokens=tokens, token_type=[NORMAL] * len(tokens), merges=merges, bos_token_id=None)
    assert pieces(tokenizer, "1234") == expected


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model": "llama"}, "'llama'"),
        ({"pre": "deepseek-r1-qwen"}, "'deepseek-r1-qwen'"),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"merges": None}, "tokenizer.ggml.merges"),
        ({"token_type": None}, "tokenizer.ggml.token_type"),
        ({"token_type": [1, 1]}, "vocabulary"),
        ({"merges": ["ab"]}, "vocabulary"),
        ({"merges": ["a zz"]}, "vocabulary"),
        ({"bos_token_id": 99999, "add_bos_token": True}, "vocabulary"),
    ],
)
def test_what_is_not_supported_is_named_in_one_line(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        build(**changes)
    message = str(caught.value)
    assert message.startswith("tiny.gguf: ")
    assert found in message
    assert "\n" not in message
