"""Write tests/goldens/tokenizers: llama.cpp's test texts, their ids, and the part of each vocabulary that they need.

    python tools/golden_llama_cpp.py FOLDER

FOLDER is models/ of llama.cpp's repository (docs/tokenizers.md says how to get it). The ids come from the original
tokenizers, by llama.cpp's conversion scripts. A whole vocabulary is too big to keep; a merge that no text applies
changes no text's ids, so only the tokens and merges that the texts use are written, under their original ids.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from check_gguf_tokenizers import cases
from gguf import GGUFReader

from checkpoints.gguf_tokenizer import tokenizer_json

OUT = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "tokenizers"
NAMES = ("deepseek-coder", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "qwen2", "qwen35", "starcoder")
SETTINGS = ("model", "pre", "add_bos_token", "add_eos_token", "add_space_prefix")
ROLES = ("bos_token_id", "eos_token_id", "unknown_token_id")


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> Iterator[tuple[str, str]]:
    """The merges that BPE applies to the symbols, which become the tokens."""
    while True:
        pairs = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
        if not pairs:
            return
        _, place = min(pairs)
        pair = symbols[place], symbols[place + 1]
        symbols[place : place + 2] = ["".join(pair)]
        yield pair


def used(backend: tokenizers.Tokenizer, texts: list[str]) -> tuple[set[str], set[tuple[str, str]]]:
    """The tokens and merges that a BPE tokenizer uses for texts, intermediate ones included."""
    model = json.loads(backend.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    tokens, merges = set(), set()
    for text in texts:
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        pieces = [text]
        if backend.pre_tokenizer:
            pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        for piece in pieces:
            symbols = list(piece)
            tokens |= {piece, *symbols}
            for left, right in merge(symbols, ranks):
                merges.add((left, right))
                tokens.add(left + right)
        tokens |= set(backend.encode(text, add_special_tokens=False).tokens)
    return tokens, merges


def golden(vocabulary: Path) -> dict[str, Any]:
    fields = GGUFReader(vocabulary).fields

    def field(name: str) -> Any:
        found = fields.get(f"tokenizer.ggml.{name}")
        return None if found is None else found.contents()

    pairs = cases(vocabulary)
    backend = tokenizers.Tokenizer.from_str(tokenizer_json(fields, vocabulary))
    needed, merges = used(backend, [text for text, _ in pairs])
    ids_of_roles = {role: field(role) for role in ROLES if field(role) is not None}
    everything = zip(field("tokens"), field("token_type"), field("scores") or field("token_type"), strict=True)
    kept = [
        [id, token, kind, score]
        for id, (token, kind, score) in enumerate(everything)
        if token in needed or id in ids_of_roles.values()
    ]
    return {
        "settings": {name: field(name) for name in SETTINGS if field(name) is not None} | ids_of_roles,
        "merges": [pair for pair in field("merges") or () if tuple(pair.rsplit(" ", 1)) in merges],
        "vocabulary": kept if field("scores") else [row[:3] for row in kept],
        "cases": [{"text": text, "ids": ids} for text, ids in pairs],
    }


def main(folder: Path) -> int:
    OUT.mkdir(exist_ok=True)
    for name in NAMES:
        written = golden(folder / f"ggml-vocab-{name}.gguf")
        lines = [f'"{key}": {json.dumps(value, separators=(",", ":"))}' for key, value in written.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (OUT / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}: {len(written['cases'])} texts, {len(written['vocabulary'])} tokens, {len(text)} bytes")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: golden_llama_cpp.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))
