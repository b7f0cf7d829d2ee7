"""Compares tokenizers made from GGUF vocabularies with the ids that others give.

    python tools/check_gguf_tokenizers.py FOLDER

FOLDER holds ggml-vocab-NAME.gguf beside NAME.gguf.inp (texts) and NAME.gguf.out (their ids), as llama.cpp's repository
does in models/ (docs/tokenizers.md says how to get it); tools/llama_cpp_tokens.mjs makes such an .out for any .inp.
Prints exact/all per file.

    python tools/check_gguf_tokenizers.py VOCABULARY.gguf TOKENIZER.json

compares with the publisher's tokenizer.json, on the texts of tests/goldens and on some of this project's files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tokenizers
from gguf import GGUFReader

from checkpoints.errors import CheckpointError
from checkpoints.gguf_tokenizer import tokenizer_json

ROOT = Path(__file__).resolve().parent.parent
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


def texts_at_hand() -> list[str]:
    """The texts of all tokenizer goldens, and whole files."""
    goldens = sorted((ROOT / "tests" / "goldens" / "tokenizers").glob("*.json"))
    files = [ROOT / "tests" / "goldens" / "tokenizer_smollm2.json", *goldens]
    texts = [case["text"] for file in files for case in json.loads(file.read_text("utf-8"))["cases"]]
    documents = [ROOT / "docs" / "architecture.md", *ROOT.glob("pallas_kernels/*/*.py")]
    return list(dict.fromkeys([*texts, *(file.read_text("utf-8") for file in sorted(documents))]))


def check_against(vocabulary: Path, publisher: Path) -> str:
    """One line that says how many texts get the ids that a tokenizer.json gives, and which do not."""
    ours = tokenizers.Tokenizer.from_str(tokenizer_json(_Header(vocabulary).fields, vocabulary))
    theirs = tokenizers.Tokenizer.from_file(str(publisher))
    texts = texts_at_hand()
    wrong = [text for text in texts if ours.encode(text).ids != theirs.encode(text).ids]
    return f"{len(texts) - len(wrong)}/{len(texts)} exact" + "".join(f"; other: {text[:60]!r}" for text in wrong)


class _Header(GGUFReader):
    """The metadata of a file, which may end before its tensors do."""

    def _build_tensors(self, *_: object) -> None:
        self.tensors = []


def main(folder: Path) -> int:
    for vocabulary in sorted(folder.glob("ggml-vocab-*.gguf")):
        if Path(f"{vocabulary}.out").exists():
            print(f"{vocabulary.stem.removeprefix('ggml-vocab-')}: {check(vocabulary)}", flush=True)
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(check_against(Path(sys.argv[1]), Path(sys.argv[2])))
    elif len(sys.argv) == 2:
        sys.exit(main(Path(sys.argv[1])))
    else:
        raise SystemExit("usage: check_gguf_tokenizers.py FOLDER | VOCABULARY.gguf TOKENIZER.json")
