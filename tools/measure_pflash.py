"""Measures what PFlash keeps and what the target still answers.

Recall of a hidden fact by depth, and answers by positions.

    python tools/measure_pflash.py [--model MODEL] [--prompts 12] [--bsa ALPHA ...]

Recall: the share of a hidden sentence's tokens that survive when 5, 10 and 20 % of a document are kept, with a scorer
that runs 1, 2, 3 ... layers. Answers: right answers out of all, for both kinds of positions and three keep ratios, and
without pruning. With --bsa: only the recall, by the sparse attention of the scorer with each threshold alpha.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import numpy as np

from dflash_jax.bench.haystack import NEEDLES, conversation
from dflash_jax.compress.policy import droppable, question_tokens
from dflash_jax.compress.prune import select
from dflash_jax.compress.score import QUESTION_ROWS, Depth, Sparse, early_exit
from dflash_jax.engine.chat import build_prompt
from dflash_jax.engine.engine import Engine
from dflash_jax.engine.loading import Model, load_model
from dflash_jax.engine.programs import Programs, chunks_of
from pallas_kernels.sparse_attention.api import SelectionRule

_KEPT = (0.05, 0.10, 0.20)
_LENGTHS = (6_000, 12_000, 24_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--bsa", type=float, nargs="+", metavar="ALPHA", help="1 keeps only what is always kept")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    print(f"recall of a hidden sentence, {model.model_id}: share kept of it at {_KEPT} of the document")
    if arguments.bsa:
        depth = early_exit(model.target.config)
        print(f"  dense: {_recall(model, depth, arguments.prompts)}")
        for alpha in arguments.bsa:
            sparse = Sparse(SelectionRule(alpha=alpha), least_tokens=0)
            print(f"  alpha {alpha}: {_recall(model, depth, arguments.prompts, sparse)}")
        return
    for layers in (1, 2, 3, 5, 7):
        print(f"  {layers} layers: {_recall(model, Depth(layers), arguments.prompts)}")
    print("right answers")
    for name, count in _answers(model, arguments.prompts).items():
        print(f"  {name}: {count} of {arguments.prompts}")


def _recall(model: Model, depth: Depth, prompts: int, sparse: Sparse | None = None) -> str:
    page_size, context = model.profile.page_size, model.target.config.context_length
    pages = -(-(context + QUESTION_ROWS) // page_size)
    sizes = {"num_pages": pages + 1, "pages_per_sequence": pages}
    programs = Programs(model.target, None, None, depth, profile=model.profile, sparse=sparse, **sizes)
    table = programs.whole_tables()
    shares: dict[float, list[float]] = {ratio: [] for ratio in _KEPT}
    for index in range(prompts):
        needle, messages = _case(index)
        if model.tokenizer is None:
            raise SystemExit("this model has no tokenizer")
        prompt = build_prompt(model.tokenizer, model.template, messages)
        mask = droppable(prompt, "agent")
        reading = programs.begin_reading(table, 0, len(prompt))
        for start, end in chunks_of(len(prompt), model.profile):
            positions = np.arange(start, end, dtype=np.int32)
            rows = (prompt.token_ids[start:end], positions)
            reading = programs.read_for_scoring(reading, *rows, table, start, start, len(prompt))
        question = question_tokens(prompt, QUESTION_ROWS)
        after = np.arange(QUESTION_ROWS, dtype=np.int32)
        asked = question[after % len(question)] if question is not None else prompt.token_ids[-QUESTION_ROWS:]
        scores = programs.score(reading, asked, len(prompt) + after, table, len(prompt), len(prompt))
        place = _place(prompt.token_ids, model.tokenizer.encode(needle.sentence))
        for ratio in _KEPT:
            shares[ratio].append(float(select(scores, mask, ratio)[place].mean()))
    return " / ".join(f"{np.mean(shares[ratio]):.2f}" for ratio in _KEPT)


def _answers(model: Model, prompts: int) -> dict[str, int]:
    right = {}
    settings = {"whole prompt": {"pflash": "off"}}
    for positions in ("original", "compact"):
        for ratio in (0.15, 0.25, 0.4):
            settings[f"{positions} positions, keep {ratio}"] = {
                "pflash": "on",
                "positions": positions,
                "keep_ratio": ratio,
            }
    for name, options in settings.items():
        with contextlib.closing(Engine(model, max_sessions=1, **options)) as engine:
            cases = [_case(index) for index in range(prompts)]
            right[name] = sum(needle.answer in engine.generate(chat, max_tokens=24).text for needle, chat in cases)
    return right


def _case(index: int):
    needle = NEEDLES[index % len(NEEDLES)]
    length = _LENGTHS[index // len(NEEDLES) % len(_LENGTHS)]
    return needle, conversation(length, needle, depth=0.2 + 0.06 * index % 0.7, offset=35_000 * index)


def _place(ids: np.ndarray, part: np.ndarray) -> slice:
    """Where a sentence's tokens are.

    Its first token may be merged with what stands before, so the rest is looked for.
    """
    inner = part[1:]
    for start in range(len(ids) - len(inner)):
        if np.array_equal(ids[start : start + len(inner)], inner):
            return slice(start, start + len(inner))
    raise SystemExit("the hidden sentence was not found among the tokens")


if __name__ == "__main__":
    main()
