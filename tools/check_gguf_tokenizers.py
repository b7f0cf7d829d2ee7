"""Compares tokenizers made from GGUF vocabularies with the ids that the original tokenizers gave.

    python tools/check_gguf_tokenizers.py FOLDER

FOLDER holds ggml-vocab-NAME.gguf beside NAME.gguf.inp (texts) and NAME.gguf.out (their ids), as llama.cpp's repository
does in models/ (docs/tokenizers.md says how to get it). Prints exact/all per file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tokenizers
from gguf import GGUFReader

from checkpoints.errors import CheckpointError
from checkpoints.gguf_tokenizer import tokenizer_json

SEPARATOR = "\n__ggml_vocab_test__\n"


def cases(vocabulary: Path) -> list[tuple[str, list[int]]]:
    """The texts beside a vocabulary, with their ids (without BOS)."""
    # As bytes: reading as text would turn every kind of line end into "\n".
    texts = Path(f"{vocabulary}.inp").read_bytes().decode().removesuffix(SEPARATOR).split(SEPARATOR)
    lines = Path(f"{vocabulary}.out").read_text(encoding="utf-8").splitlines()
    return [(text, [int(id) for id in line.split()]) for text, line in zip(texts, lines, strict=True)]


def check(vocabulary: Path) -> str:
    """One line that says how many texts get exactly the golden ids, and which is the first that does not."""
    try:
        found = tokenizers.Tokenizer.from_str(tokenizer_json(GGUFReader(vocabulary).fields, vocabulary))
    except CheckpointError as error:
        return f"not read: {str(error).removeprefix(f'{vocabulary}: ')}"
    pairs = cases(vocabulary)
    wrong = [
        (text, ids, got) for text, ids in pairs if (got := found.encode(text, add_special_tokens=False).ids) != ids
    ]
    line = f"{len(pairs) - len(wrong)}/{len(pairs)} exact"
    if wrong:
        text, ids, got = wrong[0]
        line += f"; first other: {text!r}: expected {ids}, got {got}"
    return line


def main(folder: Path) -> int:
    for vocabulary in sorted(folder.glob("ggml-vocab-*.gguf")):
        if Path(f"{vocabulary}.out").exists():
            print(f"{vocabulary.stem.removeprefix('ggml-vocab-')}: {check(vocabulary)}", flush=True)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: check_gguf_tokenizers.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))
