"""How byte-level BPE tokenizers cut a text before they merge: by the name that GGUF files give (tokenizer.ggml.pre).

The expressions are those of the models' own tokenizer.json files. tools/check_gguf_tokenizers.py compares what comes of
them with ids that the original tokenizers gave; docs/tokenizers.md says which were compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """What happens to a text before merging.

    expressions  applied one after the other; a match becomes a piece of its own
    whole_words  a piece that is in the vocabulary is one token, whatever the merges say
    begins       a text begins with BOS unless the file says otherwise
    composes     a text is brought into Unicode's composed form (NFC)
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False
    composes: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_digits_then_gpt2 = PreTokenizer((r"\p{N}", _GPT2))
_gpt2 = PreTokenizer((_GPT2,))
_llama3 = PreTokenizer((_LLAMA3,), whole_words=True, begins=True)
_qwen2 = PreTokenizer((_QWEN2,), composes=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _gpt2,
    "mpt": _gpt2,
    "olmo": _gpt2,
    "smollm": _digits_then_gpt2,
    "starcoder": _digits_then_gpt2,
    "refact": _digits_then_gpt2,
    "command-r": _digits_then_gpt2,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "qwen2": _qwen2,
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_QWEN35,), composes=True),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, begins=True),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
}
"""By the value of tokenizer.ggml.pre. "default" is llama.cpp's rule for files that say nothing else."""

_TELLING_TOKENS = {"<|begin_of_text|>": "llama-bpe", "<|im_start|>": "qwen2"}


def named_or_guessed(name: str | None, tokens: Container[str]) -> str:
    """The pre-tokenizer's name; for files from before there was one, the family that its tokens tell."""
    if name is not None:
        return name
    return next((guess for token, guess in _TELLING_TOKENS.items() if token in tokens), "default")
