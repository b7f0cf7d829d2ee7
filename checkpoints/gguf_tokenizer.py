"""tokenizer.json from the vocabulary in a GGUF file, for byte-level BPE tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from checkpoints.errors import CheckpointError

_SPECIAL, _USER_DEFINED = 3, 4
"""Token types of GGUF: control tokens, and added tokens that are ordinary text."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2}
"""Regular expressions of the pre-tokenizers that split before the byte-level alphabet is applied."""


def tokenizer_json(fields: Mapping[str, Any], path: Path) -> str:
    """The text of a tokenizer.json. Raises CheckpointError for a kind of tokenizer that is not supported."""
    kind = fields["tokenizer.ggml.model"].contents()
    if kind != "gpt2":
        raise CheckpointError(f"{path}: tokenizer {kind!r} is not supported in GGUF; supported: gpt2 (byte-level BPE)")
    pre = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else "default"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(_split_merge(merge)) for merge in fields["tokenizer.ggml.merges"].contents()]
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = _pre_tokenizer(pre, path)
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=type_ == _SPECIAL, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_SPECIAL, _USER_DEFINED)
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])
    begins = "tokenizer.ggml.add_bos_token" in fields and fields["tokenizer.ggml.add_bos_token"].contents()
    if begins and "tokenizer.ggml.bos_token_id" in fields:
        bos = int(fields["tokenizer.ggml.bos_token_id"].contents())
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=None, special_tokens=[(tokens[bos], bos)]
        )
    return backend.to_str()


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


def _split_merge(merge: str) -> list[str]:
    # A merged token may itself begin with a space-like character: the separator is the first space after it.
    place = merge.index(" ", 1)
    return [merge[:place], merge[place + 1 :]]
