"""Text to token ids and back, on the `tokenizers` library.

The decoder streams exactly what decode() returns.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

GUARD = "\ufdd0"
"""A Unicode noncharacter, never part of exchanged text.

Standing inside a string of a special token it makes it text.
"""

_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"


def is_markup(token: str) -> bool:
    """Whether an added token looks like markup, <think> or [INST], and not like a word or a space."""
    return len(token) > 2 and token[0] + token[-1] in ("<>", "[]")


class TokenizerError(ValueError):
    """A tokenizer.json that is missing, damaged or of a kind that is not supported."""


def replace_lone_surrogates(text: str) -> str:
    """Text that can be encoded as UTF-8: surrogate pairs become their character, lone surrogates U+FFFD."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Tokenizer:
    """A tokenizer.json. Safe to share between threads.

    special_ids      ids of special tokens, which end turns and the like
    special_strings  their strings
    markup_ids       ids of the special tokens and of added ones in brackets, such as <think>
    added_strings    strings of added tokens that are not special, such as Qwen's <think>
    vocab_size       1 + the largest id
    """

    def __init__(self, source: str) -> None:
        try:
            document = json.loads(source)
            # Writing and reading a big vocabulary takes seconds.
            source = json.dumps(document) if _keep_whole_offsets(document.get("post_processor")) else source
            self._with_special = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the Rust library raises bare Exception
            raise TokenizerError(f"not a usable tokenizer.json: {str(error).splitlines()[0]}") from error
        self._with_special.no_padding()
        self._with_special.no_truncation()
        added = self._with_special.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.special_strings = tuple(token.content for token in added.values() if token.special)
        self.added_strings = tuple(token.content for token in added.values() if not token.special)
        self.markup_ids = self.special_ids.union(id for id, token in added.items() if is_markup(token.content))
        self.vocab_size = 1 + max(self._with_special.get_vocab(with_added_tokens=True).values(), default=-1)
        self._with_special.add_special_tokens([tokenizers.AddedToken(GUARD, normalized=False, special=True)])
        self._guard_id = self._with_special.token_to_id(GUARD)
        self._byte_of_character, self._leading_spaces = _decoder_kind(document.get("decoder"))
        self._bytes: dict[int, bytes] = {}

    @functools.cached_property
    def _as_text(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self._with_special.to_str())
        backend.encode_special_tokens = True
        return backend

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder. Raises TokenizerError."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return Tokenizer(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"cannot read the tokenizer {file}: {error}") from error
        except TokenizerError as error:
            raise TokenizerError(f"{file}: {error}") from error

    def encode(self, text: str, special: bool = True, *, begin: bool = False) -> np.ndarray:
        """Token ids i32[S] of a text.

        special=False reads the strings of special tokens as plain text. begin=True adds what the tokenizer puts around
        a whole text (a BOS token, in some models). Lone surrogates are replaced by U+FFFD.
        """
        backend = self._with_special if special else self._as_text
        encoding = backend.encode(replace_lone_surrogates(text).replace(GUARD, ""), add_special_tokens=begin)
        return np.asarray(encoding.ids, np.int32)

    def encode_guarded(self, text: str) -> tuple[np.ndarray, np.ndarray, str]:
        """Token ids i32[S], character offsets i64[S, 2] (start, end) and the text, for a text that may hold GUARDs.

        Special tokens are recognised except where a GUARD stands inside their string. GUARDs leave no token and no
        character: offsets count in the returned text, which is free of them.
        """
        encoding = self._with_special.encode(replace_lone_surrogates(text), add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        if GUARD not in text:
            return ids, offsets, text
        kept = ids != self._guard_id
        guards = np.asarray([match.start() for match in re.finditer(GUARD, text)])
        offsets = offsets[kept]
        return ids[kept], offsets - np.searchsorted(guards, offsets, side="left"), text.replace(GUARD, "")

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        decoder = IncrementalDecoder(self, skip_special=skip_special)
        return decoder.push(ids) + decoder.flush()

    def token(self, id: int) -> str | None:
        """The vocabulary's own string for an id, None outside of it."""
        return self._with_special.id_to_token(id) if 0 <= id < self.vocab_size else None

    def id_of(self, token: str) -> int | None:
        """The id of a vocabulary entry, None if there is no such entry."""
        return self._with_special.token_to_id(token) if token != GUARD else None

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token adds to a text, not always whole characters."""
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self._spell(self.token(int(id)))
        return known

    def _spell(self, token: str | None) -> bytes:
        if token is None:
            return b""
        if self._byte_of_character:
            try:
                return bytes(self._byte_of_character[character] for character in token)
            except KeyError:
                return token.encode("utf-8", "replace")
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(_WORD_START, " ").encode("utf-8", "replace")


class IncrementalDecoder:
    """Text of a growing sequence of tokens. However the ids are split, the pushes plus flush() make up decode(ids).

    At most the three bytes of an unfinished UTF-8 character are held back. Special tokens add nothing unless
    skip_special is False.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces_to_strip = tokenizer._leading_spaces

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that these tokens complete, possibly empty."""
        ids = (ids,) if isinstance(ids, int | np.integer) else ids
        data = b"".join(self._tokenizer.token_bytes(int(id)) for id in ids if int(id) not in self._skipped)
        return self._utf8.decode(self._strip_leading(data))

    def flush(self) -> str:
        """What an unfinished character leaves behind: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)

    def _strip_leading(self, data: bytes) -> bytes:
        while self._spaces_to_strip and data:
            if not data.startswith(b" "):
                self._spaces_to_strip = 0
            else:
                data = data[1:]
                self._spaces_to_strip -= 1
        return data


def _keep_whole_offsets(post_processor: Any) -> bool:
    """Whether a processor had to be changed to give whole offsets.

    They must cover the spaces of a token, or a token that straddles two spans looks as if it lay in one.
    """
    if not isinstance(post_processor, dict):
        return False
    changed = post_processor.get("trim_offsets", False)
    if changed:
        post_processor["trim_offsets"] = False
    return any([changed, *(_keep_whole_offsets(step) for step in post_processor.get("processors", ()))])


def _decoder_kind(decoder: Any) -> tuple[dict[str, int] | None, int]:
    """The character-to-byte table of a byte-level decoder, and leading spaces to strip.

    The table is None for SentencePiece spelling.
    """
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else [{}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_table(), 0
    if kinds == ["Metaspace"]:
        return None, 0 if steps[0].get("prepend_scheme") == "never" else 1
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return None, sum(step.get("start", 0) for step in steps if step["type"] == "Strip")
    name = "+".join(str(kind) for kind in kinds)
    raise TokenizerError(f"decoder {name} is not supported: expected ByteLevel, Metaspace or a ByteFallback sequence")


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest follows from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + place): b for place, b in enumerate(hidden)}
