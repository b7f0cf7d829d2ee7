"""Writes the tables of README.md and docs/kernels.md from the files in bench/results: no figure is typed by hand.

python tools/measured_tables.py
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from dflash_jax.bench.report import BANDWIDTH

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DEVICES = {"cpu": "2 CPU cores", "h100": "H100"}
SHAPES = {"gemma4-31b": "Gemma 4 31B", "gemma4-26b": "Gemma 4 26B-A4B"}


def main() -> None:
    fill(ROOT / "README.md", reading(), steps(), decode(), prefill())
    fill(ROOT / "docs" / "training.md", drafting(), by_context(), recipes())
    fill(
        ROOT / "docs" / "kernels.md",
        checks("H100"),
        checks("H200"),
        wide_heads(),
        chunks(),
        chunk_matmuls(),
        matmuls(),
        reading(),
        steps(),
        shares(),
    )


def fill(file: Path, *tables: list[str]) -> None:
    """Puts the tables, each of some lines, between a document's two marks."""
    joined, text = "\n\n".join("\n".join(lines) for lines in tables), file.read_text(encoding="utf-8")
    marked = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
    file.write_text(marked.sub(lambda found: f"{found[1]}\n{joined}\n\n{found[2]}", text), encoding="utf-8")


def prefill() -> list[str]:
    lines = [
        "| SmolLM2-135M, prompt with a hidden fact | kept by PFlash | first token without | with PFlash | fact found |",
        "|---|---|---|---|---|",
    ]
    for short, device in DEVICES.items():
        for row in read(f"{short}-smollm2-prefill.json")["rows"]:
            found = " / ".join("yes" if row[key] else "no" for key in ("found_plain", "found_pflash"))
            lines.append(
                f"| {device}, {row['prompt_tokens']:,} tokens | {row['kept_tokens']:,} | {row['ttft_s_plain']:.2f} s "
                f"| {row['ttft_s_pflash']:.2f} s | {found} |"
            )
    return lines


def decode() -> list[str]:
    lines = [
        "| SmolLM2-135M, one answer at a time | plain tokens/s | with DFlash | accept length |",
        "|---|---|---|---|",
    ]
    for short, device in DEVICES.items():
        report = read(f"{short}-smollm2-decode.json")
        name = report["model"].rpartition("-")[2]
        total = report["total"]
        fast = f"{total['tok_s_dflash']:.0f} | {total['accept_length']:.2f}" if total["tok_s_dflash"] else "|"
        lines.append(f"| {device}, {name} | {total['tok_s_plain']:.0f} | {fast} |")
    other = json.loads((RESULTS / "cpu-smollm2-llama-cpp.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    lines.append(f"| {DEVICES['cpu']}, llama.cpp, the published Q4_1 file | {other['total_tok_s']:.0f} | | |")
    return lines


def drafting() -> list[str]:
    """Accept lengths and rates of each set of prompts."""
    lines = [
        "| rows, drawn at | prompts | accept length | plain tokens/s | DFlash tokens/s | tokens equal |",
        "|---|---|---|---|---|---|",
    ]
    for file in sorted(RESULTS.glob("h100-smollm2-decode*.json"), key=lambda file: (len(file.stem), file.stem)):
        report = read(file.name)
        form = f"tree of {report['tree']}" if report.get("tree") else "chain of 16"
        name = f"{form}, temperature {report['temperature']}"
        for prompts, row in {**report["sets"], "all": report["total"]}.items():
            lines.append(
                f"| {name} | {prompts} | {row['accept_length']:.2f} | {row['tok_s_plain']:.0f} "
                f"| {row['tok_s_dflash']:.0f} | {'yes' if row['equal_tokens'] else 'no'} |"
            )
    return lines


def by_context() -> list[str]:
    """Accept lengths of prompts that are alike in length; total tokens over total steps."""
    lines = [
        "| tokens of context, greedy | prompts | accept length | plain tokens/s | DFlash tokens/s |",
        "|---|---|---|---|---|",
    ]
    rows = read("h100-smollm2-decode.json")["rows"]
    for first, end in itertools.pairwise((0, 512, 1500, 2500, 3500, 8192)):
        here = [row for row in rows if first <= row["prompt_tokens"] < end]
        tokens = sum(row["new_tokens"] for row in here)
        length, plain, fast = (
            tokens / sum(row["new_tokens"] / row[key] for row in here)
            for key in ("accept_length", "tok_s_plain", "tok_s_dflash")
        )
        lines.append(f"| {first:,} to {end:,} | {len(here)} | {length:.2f} | {plain:.0f} | {fast:.0f} |")
    return lines


def steps() -> list[str]:
    lines = [
        "| shape, random 4-bit weights, on an H100 | context | step of 16 rows | limit | draft and verify a tree "
        "| tokens/s if 4, 6, 8 are accepted |",
        "|---|---|---|---|---|---|",
    ]
    for file, name in SHAPES.items():
        for row in read(f"h100-{file}-step.json")["rows"]:
            rates = ", ".join(f"{row['tok_s_at_accept_length'][length]:.0f}" for length in ("4", "6", "8"))
            lines.append(
                f"| {name} | {row['context']:,} tokens | {row['step_ms']:.1f} ms | {row['limit_ms']:.1f} ms "
                f"| {row['block_ms']:.1f} ms | {rates} |"
            )
    return lines


def reading() -> list[str]:
    """Time to the first token of big models."""
    lines = [
        "| shape, random 4-bit weights, on an H100 | prompt | first token | its products at 600 TFLOP/s "
        "| with PFlash, a quarter kept | of it scoring |",
        "|---|---|---|---|---|---|",
    ]
    for file, name in SHAPES.items():
        for row in read(f"h100-{file}-prefill.json")["rows"]:
            times = (f"{row[key]:.2f} s" for key in ("ttft_s_plain", "limit_s", "ttft_s_pflash", "score_s"))
            lines.append(f"| {name} | {row['prompt_tokens']:,} tokens | {' | '.join(times)} |")
    return lines


def chunk_matmuls() -> list[str]:
    """Many rows of 4-bit weights: the fastest config of each, and what XLA does with dense weights."""
    report = read("h100-chunk-matmul.json")
    dense = {(row["case"], row["rows"]): row for row in report["xla"]}
    lines = [
        "| 4-bit weights, in a chain | rows | Mosaic | TFLOP/s | XLA, weights in bf16 | made dense before |",
        "|---|---|---|---|---|---|",
    ]
    for (case, rows), same in itertools.groupby(report["rows"], lambda row: (row["case"], row["rows"])):
        best, other = min(same, key=lambda row: row["us"]), dense.get((case, rows), {})
        xla = (f"{other[key]} µs" if key in other else "" for key in ("bf16_us", "dense_first_us"))
        lines.append(f"| {case} | {rows:,} | {best['us']:.0f} µs | {best['tflops']} | {' | '.join(xla)} |")
    return lines


def checks(device: str) -> list[str]:
    """What gpu_check measured."""
    lines = [
        f"| operation ({device}) | case | kernel | error | time | XLA reference | floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in read(f"{device.lower()}-gpu-check.json")["rows"]:
        if row["floor_us"] and row["floor_us"] > 1:
            lines.append(
                f"| `{row['operation']}` | {row['case']} | {row.get('kernel', 'triton')} | {row['relative_error']:.1e} "
                f"| {row['us']:.0f} µs | {row['us_reference']:.0f} µs | {row['floor_us']:.1f} µs |"
            )
    return lines


def wide_heads() -> list[str]:
    """Both kernels for heads of 512."""
    lines = ["| heads of 512, kernel alone | Triton | Mosaic | floor | of the limit |", "|---|---|---|---|---|"]
    for row in read("h100-attention-512.json")["rows"]:
        share = f"{100 * row['floor_us'] / row['mosaic_us']:.0f} %"
        times = " | ".join(f"{row[key]:.0f} µs" for key in ("triton_us", "mosaic_us", "floor_us"))
        lines.append(f"| {row['case']} | {times} | {share} |")
    return lines


def chunks() -> list[str]:
    """Both kernels for chunks of a prompt, on pages, and cuDNN's on keys that lie one behind the other."""
    lines = [
        "| chunk of a prompt, in a chain | Triton | Mosaic | cuDNN, contiguous keys | floor | of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for row in read("h100-chunk-attention.json")["rows"]:
        share = f"{100 * row['floor_us'] / row['mosaic_us']:.0f} %"
        times = " | ".join(f"{row[key]:.0f} µs" for key in ("triton_us", "mosaic_us", "cudnn_us", "floor_us"))
        lines.append(f"| {row['case']} | {times} | {share} |")
    return lines


def recipes() -> list[str]:
    """What differed in one thing each, after the same number of steps."""
    rows = [row for row in read("h100-recipes.json")["rows"] if "error" not in row]
    steps = {row["steps"] for row in rows}
    lines = [f"| recipe, {', '.join(map(str, steps))} steps from nothing | accept length, held out |", "|---|---|"]
    for row in sorted(rows, key=lambda row: -row["held_out_accept_length"]):
        lines.append(f"| {row['recipe']} | {row['held_out_accept_length']:.2f} |")
    return lines


def matmuls() -> list[str]:
    """The best configs of the sweeps: kernels alone, or in a chain of calls with the adding of their splits."""
    lines = ["| 16 rows, best of a sweep | measured | time | floor | of the limit |", "|---|---|---|---|---|"]
    for line in (RESULTS / "h100-matmul-tune.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        floor = 1e6 * row["bytes"] / BANDWIDTH["NVIDIA H100 80GB HBM3"]
        share = f"{100 * floor / row['us']:.0f} %"
        lines.append(f"| {row['case']} | {row['measured']} | {row['us']:.1f} µs | {floor:.1f} µs | {share} |")
    return lines


def shares() -> list[str]:
    """What a step spends its time on."""
    lines = ["| a step on an H100 | kernel | calls | time | share |", "|---|---|---|---|---|"]
    for model, name in (("SmolLM2", "smollm2"), ("Gemma 4 31B, 4K", "gemma4-31b"), ("26B-A4B, 4K", "gemma4-26b")):
        for kind in read(f"h100-{name}-profile.json")["kinds"]:
            step = f"{model}, {kind['kind']}: {kind['busy_us']:.0f} µs in {kind['kernels']:.0f} kernels"
            for row in kind["operations"][:8]:
                share = f"{100 * row['share']:.0f} %"
                lines.append(f"| {step} | `{row['name']}` | {row['calls']:.0f} | {row['us']:.0f} µs | {share} |")
    return lines


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
