"""Tokenizers from GGUF files: ids as transformers gives them, and what is refused."""

from __future__ import annotations

import json
import unicodedata
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


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("deepseek-coder", 0),
        ("falcon", 0),
        ("gemma-4", 0),
        ("gpt-2", 0),
        ("llama-bpe", 0),
        ("llama-spm", 0),
        ("qwen2", 0),
        # llama.cpp leaves decomposed characters alone, transformers composes them (NFC); so do we.
        ("qwen35", 3),
        ("starcoder", 0),
    ],
)
def test_ids_are_those_of_the_original_tokenizers(goldens: Path, name: str, others: int) -> None:
    golden = json.loads((goldens / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))
    ids, tokens, types, *scores = zip(*golden["vocabulary"], strict=True)
    place = {id: index for index, id in enumerate(ids)}
    settings = {role: place[v] if role.endswith("_id") else v for role, v in golden["settings"].items()}
    values = {**settings, "tokens": list(tokens), "token_type": list(types), "merges": golden["merges"]}
    values |= {"scores": list(scores[0])} if scores else {}
    vocabulary = {f"tokenizer.ggml.{key}": Field(value) for key, value in values.items()}
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json(vocabulary, Path(name)))
    encoded = {c["text"]: tokenizer.encode(c["text"], add_special_tokens=False) for c in golden["cases"]}
    wrong = [c for c in golden["cases"] if [ids[i] for i in encoded[c["text"]].ids] != c["ids"]]
    assert len(golden["cases"]) >= 46
    assert len(wrong) == others
    assert all(unicodedata.normalize("NFC", case["text"]) != case["text"] for case in wrong)
    for text, encoding in encoded.items():
        composed = unicodedata.normalize("NFC", text) if name.startswith("qwen") else text
        assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == composed


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


def test_llama_3_takes_whole_words_that_no_merge_makes_and_begins_with_bos() -> None:
    changes = {"tokens": [*ALPHABET, "abc", "<s>"], "token_type": [NORMAL] * 257 + [CONTROL], "merges": []}
    assert pieces(build(pre="llama-bpe", bos_token_id=257, **changes), "abc") == ["<s>", "abc"]
    assert pieces(build(pre="qwen2", bos_token_id=257, **changes), "abc") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("<|begin_of_text|>", ["<|begin_of_text|>", "123", "4"]),
        ("<|im_start|>", ["1", "2", "3", "4"]),
        ("<other>", ["123", "4"]),
    ],
)
def test_a_file_that_names_no_pre_tokenizer_is_known_by_its_tokens(token: str, expected: list[str]) -> None:
    tokens = [*ALPHABET, "12", "123", "1234", token]
    changes = {"tokens": tokens, "token_type": [NORMAL] * 259 + [CONTROL], "merges": ["1 2", "12 3", "123 4"]}
    assert pieces(build(pre=None, bos_token_id=259, **changes), "1234") == expected


def test_an_end_is_marked_when_the_file_says_so() -> None:
    ends = {"add_eos_token": True, "eos_token_id": 257}
    assert pieces(build(**ends), "a") == ["a", "<s>"]
    assert pieces(build(**ends, add_bos_token=True), "a") == ["<s>", "a", "<s>"]


def test_qwen_composes_characters() -> None:
    assert pieces(build(pre="qwen2"), "e\u0301") == pieces(build(pre="qwen2"), "\u00e9")
    assert pieces(build(pre="llama-bpe"), "e\u0301") != pieces(build(pre="llama-bpe"), "\u00e9")


UNKNOWN, BYTE = 2, 6
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def spelled(kind: str, words: dict[str, float], merges: list[str], added: dict[str, int], **changes: Any) -> Any:
    """A vocabulary with spaces spelled out: <unk>, <s>, the bytes, words with scores, and added tokens."""
    tokens = ["<unk>", "<s>", *BYTES, *words, *added]
    return build(
        model=kind,
        pre=None,
        tokens=tokens,
        token_type=[UNKNOWN, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words), *added.values()],
        scores=[0.0] * 258 + [*words.values()] + [-1000.0] * len(added),
        merges=merges,
        **{"bos_token_id": 1, "unknown_token_id": 0, "add_bos_token": False, **changes},
    )


def sentencepiece(words: dict[str, float], added: dict[str, int] | None = None, **changes: Any) -> Any:
    return spelled("llama", words, [], added or {}, **changes)


def test_sentencepiece_merges_by_score() -> None:
    words = {"▁": -9, "a": -9, "b": -9, "c": -9, "ab": -2, "bc": -1, "abc": -3}
    assert pieces(sentencepiece(words, add_space_prefix=False), "abc") == ["abc"]
    del words["abc"]
    assert pieces(sentencepiece(words, add_space_prefix=False), "abc") == ["a", "bc"]
    assert pieces(sentencepiece({**words, "bc": -5}, add_space_prefix=False), "abc") == ["ab", "c"]


def test_sentencepiece_begins_with_a_space_unless_the_file_says_otherwise() -> None:
    words = {"▁": -9, "a": -9, "▁a": -1}
    with_prefix = sentencepiece(words)
    assert pieces(with_prefix, "a a") == ["▁a", "▁a"]
    assert with_prefix.decode(with_prefix.encode("a a").ids) == "a a"
    without = sentencepiece(words, add_space_prefix=False)
    assert pieces(without, "a a") == ["a", "▁a"]
    assert without.decode(without.encode(" a").ids) == " a"


def test_sentencepiece_begins_with_bos_unless_the_file_says_otherwise() -> None:
    assert pieces(sentencepiece({"▁": -1, "a": -9}, add_bos_token=None), "a") == ["<s>", "▁", "a"]
    assert pieces(sentencepiece({"▁": -1, "a": -9}), "a") == ["▁", "a"]


def test_characters_without_a_token_become_bytes() -> None:
    for tokenizer in (sentencepiece({"a": -9, "▁": -9}, add_space_prefix=False), gemma4(["a"])):
        assert pieces(tokenizer, "aé🙂") == ["a", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
        assert tokenizer.decode(tokenizer.encode("aé🙂").ids) == "aé🙂"


def test_added_tokens_of_spaces_are_longest_first() -> None:
    tokenizer = sentencepiece({"▁": -9, "a": -9}, {"  ": USER_DEFINED, "   ": USER_DEFINED}, add_space_prefix=False)
    assert pieces(tokenizer, "a    a") == ["a", "   ", "▁", "a"]
    assert tokenizer.decode(tokenizer.encode("a    a").ids) == "a    a"


def gemma4(words: list[str], merges: list[str] | None = None, **changes: Any) -> Any:
    added = {"<|tool>": CONTROL, '<|"|>': USER_DEFINED}
    return spelled("gemma4", dict.fromkeys(words, 0.0), merges or [], added, **changes)


def test_gemma_4_merges_over_spaces_and_lines() -> None:
    words = ["▁", "a", "\n", "\n\n", "▁a", "\u3000", "\u3000\u3000", "a▁a"]
    tokenizer = gemma4(words, ["\n \n", "▁ a", "\u3000 \u3000", "a ▁a"])
    assert pieces(tokenizer, "a a") == ["a▁a"]
    assert pieces(tokenizer, " a\n\n\u3000\u3000") == ["▁a", "\n\n", "\u3000\u3000"]
    assert tokenizer.decode(tokenizer.encode(" a\n\n").ids) == " a\n\n"


def test_the_first_token_of_a_merge_may_begin_with_a_space() -> None:
    model = json.loads(gemma4([" ", "a", " a", "b", " ab"], ["  a", " a b"]).to_str())["model"]
    assert [tuple(merge) for merge in model["merges"]] == [(" ", "a"), (" a", "b")]


def test_gemma_4_begins_with_bos_and_keeps_its_added_tokens() -> None:
    tokenizer = gemma4(["a"], add_bos_token=None)
    assert pieces(tokenizer, '<|tool>a<|"|>') == ["<s>", "<|tool>", "a", '<|"|>']
    assert tokenizer.decode(tokenizer.encode('<|tool>a<|"|>').ids) == 'a<|"|>'


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model": "bert"}, "'bert'"),
        ({"model": "llama"}, "tokenizer.ggml.scores"),
        ({"pre": "viking"}, "'viking'"),
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
