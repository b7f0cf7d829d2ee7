"""tokenizer.json from the vocabulary in a GGUF file: byte-level BPE, SentencePiece and Gemma 4's spelled-out BPE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from checkpoints.errors import CheckpointError
from checkpoints.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, named_or_guessed

_SPECIAL, _USER_DEFINED = 3, 4
"""Token types of GGUF: control tokens, and added tokens that are ordinary text."""

_SPACE = "\u2581"
"""How SentencePiece spells a space."""


class _Vocabulary:
    """The tokenizer's metadata of one file."""

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        self._fields, self._path = fields, path
        self.tokens: list[str] = self.need("tokens")
        self.types: list[int] = self.need("token_type")

    def get(self, name: str, default: Any = None) -> Any:
        field = self._fields.get(f"tokenizer.ggml.{name}")
        return default if field is None else field.contents()

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise CheckpointError(
                f"{self._path}: metadata tokenizer.ggml.{name} is missing; the file is damaged or of another tokenizer"
            )
        return value

    def token(self, role: str, *, default: bool) -> str | None:
        """The token that every text begins ("bos") or ends ("eos") with; None if there is none."""
        id = self.get(f"{role}_token_id")
        return self.tokens[id] if id is not None and self.get(f"add_{role}_token", default) else None


def tokenizer_json(fields: Mapping[str, Any], path: Path) -> str:
    """The text of a tokenizer.json. Raises CheckpointError for a kind of tokenizer that is not supported."""
    kind = fields["tokenizer.ggml.model"].contents()
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise CheckpointError(f"{path}: tokenizer {kind!r} is not supported in GGUF; supported: {known}")
    vocabulary = _Vocabulary(fields, path)
    pre = _pre_tokenizer(vocabulary, path) if kind == "gpt2" else None
    try:
        backend = _KINDS[kind](vocabulary) if pre is None else _byte_level_bpe(vocabulary, pre)
        begins = pre.begins if pre is not None else True
        _add_tokens(backend, vocabulary)
        _add_ends(backend, vocabulary.token("bos", default=begins), vocabulary.token("eos", default=False))
        return backend.to_str()
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers package raises bare Exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: the vocabulary does not fit together: {reason}; fetch the file again"
        ) from error


def _pre_tokenizer(vocabulary: _Vocabulary, path: Path) -> PreTokenizer:
    name = named_or_guessed(vocabulary.get("pre"), vocabulary.tokens)
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise CheckpointError(f"{path}: pre-tokenizer {name!r} is not supported in GGUF; supported: {known}")
    return PRE_TOKENIZERS[name]


def _byte_level_bpe(vocabulary: _Vocabulary, pre: PreTokenizer) -> tokenizers.Tokenizer:
    merges = [_split_merge(merge) for merge in vocabulary.need("merges")]
    backend = tokenizers.Tokenizer(models.BPE(_ids(vocabulary), merges, ignore_merges=pre.whole_words))
    if pre.composes:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in pre.expressions]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """SentencePiece merges the pair whose token has the highest score; as BPE, pairs are ranked by that score."""
    scores: Sequence[float] = vocabulary.need("scores")
    ids = _ids(vocabulary)
    pairs = [(scores[id], *pair) for token, id in ids.items() for pair in _pairs(token, ids)]
    pairs.sort(key=lambda pair: -pair[0])
    prefix = bool(vocabulary.get("add_space_prefix", True))
    backend = _spelled_bpe(vocabulary, [(left, right) for _, left, right in pairs])
    if prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), backend.normalizer])
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    return backend


def _gemma4(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    return _spelled_bpe(vocabulary, [_split_merge(merge) for merge in vocabulary.need("merges")])


def _spelled_bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """BPE over whole texts with spaces spelled out; characters without a token become their bytes' tokens."""
    unknown = vocabulary.get("unknown_token_id")
    backend = tokenizers.Tokenizer(
        models.BPE(
            _ids(vocabulary),
            merges,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


_KINDS: dict[str, Callable[..., tokenizers.Tokenizer]] = {
    "gpt2": _byte_level_bpe,
    "llama": _sentencepiece,
    "gemma4": _gemma4,
}
"""Values of tokenizer.ggml.model."""


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    added = [
        AddedToken(token, special=type_ == _SPECIAL, normalized=False)
        for token, type_ in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if type_ in (_SPECIAL, _USER_DEFINED)
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])


def _add_ends(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    ends = [token for token in (bos, eos) if token is not None]
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(token for token in (bos, "$A", eos) if token is not None),
            pair=None,
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(ends)],
        )


def _ids(vocabulary: _Vocabulary) -> dict[str, int]:
    return {token: id for id, token in enumerate(vocabulary.tokens)}


def _pairs(token: str, ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The ways to put a token together from two others."""
    for place in range(1, len(token)):
        left, right = token[:place], token[place:]
        if left in ids and right in ids:
            yield left, right


def _split_merge(merge: str) -> tuple[str, str]:
    # A merged token may itself begin with a space-like character: the separator is the first space after it.
    place = merge.index(" ", 1)
    return merge[:place], merge[place + 1 :]
