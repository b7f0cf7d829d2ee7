"""tokenizer.json from the vocabulary in a GGUF file, for byte-level BPE tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from checkpoints.errors import CheckpointError

_SPECIAL, _USER_DEFINED = 3, 4
"""Token types of GGUF: control tokens, and added tokens that are ordinary text."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2}
"""Regular expressions of the pre-tokenizers that split before the byte-level alphabet is applied."""


def tokenizer_json(fields: Mapping[str, Any], path: Path) -> str:
    """The text of a tokenizer.json. Raises CheckpointError for a kind of tokenizer that is not supported."""
    kind = fields["tokenizer.ggml.model"].contents()
    if kind != "gpt2":
        raise CheckpointError(f"{path}: tokenizer {kind!r} is not supported in GGUF; supported: gpt2 (byte-level BPE)")
    needed = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")]
    for key in needed:
        if key not in fields:
            raise CheckpointError(f"{path}: metadata {key} is missing; the file is damaged or of another tokenizer")
    pre = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else "default"
    splitter = _pre_tokenizer(pre, path)
    begins = "tokenizer.ggml.add_bos_token" in fields and fields["tokenizer.ggml.add_bos_token"].contents()
    bos = (
        fields["tokenizer.ggml.bos_token_id"].contents() if begins and "tokenizer.ggml.bos_token_id" in fields else None
    )
    tokens, types, merges = (fields[key].contents() for key in needed)
    try:
        return _byte_level_bpe(tokens, types, merges, splitter, bos).to_str()
    except Exception as error:  # the tokenizers package raises bare Exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: the vocabulary does not fit together: {reason}; fetch the file again"
        ) from error


def _byte_level_bpe(
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Sequence[str],
    splitter: pre_tokenizers.PreTokenizer,
    bos: int | None,
) -> tokenizers.Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [_split_merge(merge) for merge in merges]))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=type_ == _SPECIAL, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_SPECIAL, _USER_DEFINED)
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=None, special_tokens=[(tokens[bos], bos)]
        )
    return backend


def _pre_tokenizer(pre: str, path: Path) -> pre_tokenizers.PreTokenizer:
    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if pre in ("default", "gpt-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(["default", "gpt-2", "smollm", *_SPLITS])
    raise CheckpointError(f"{path}: pre-tokenizer {pre!r} is not supported in GGUF; supported: {known}")


def _split_merge(merge: str) -> tuple[str, str]:
    # A merged token may itself begin with a space-like character: the separator is the first space after it.
    place = merge.index(" ", 1)
    return merge[:place], merge[place + 1 :]
