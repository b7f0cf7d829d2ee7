"""Writes the tables of docs/kernels.md from the files in bench/results.

python tools/kernel_tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from dflash_jax.bench.report import BANDWIDTH

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def main() -> None:
    doc = ROOT / "docs" / "kernels.md"
    text = doc.read_text(encoding="utf-8")
    tables = "\n".join([*checks(), "", *matmuls(), "", *steps()])
    marked = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
    doc.write_text(marked.sub(lambda found: f"{found[1]}\n{tables}\n\n{found[2]}", text), encoding="utf-8")


def checks() -> list[str]:
    report = json.loads((RESULTS / "h100-gpu-check.json").read_text(encoding="utf-8"))
    lines = ["| operation | case | error | time | XLA reference | floor |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        if row["floor_us"] and row["floor_us"] > 1:
            lines.append(
                f"| `{row['operation']}` | {row['case']} | {row['relative_error']:.1e} | {row['us']:.0f} µs "
                f"| {row['us_reference']:.0f} µs | {row['floor_us']:.1f} µs |"
            )
    return lines


def matmuls() -> list[str]:
    """The best configs of the sweep."""
    lines = ["| 16 rows, w4 (best of the sweep) | time | floor | of the limit |", "|---|---|---|---|"]
    for line in (RESULTS / "h100-w4-tune.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        floor = 1e6 * row["bytes"] / BANDWIDTH["NVIDIA H100 80GB HBM3"]
        lines.append(f"| {row['case']} | {row['us']:.0f} µs | {floor:.1f} µs | {100 * floor / row['us']:.0f} % |")
    return lines


def steps() -> list[str]:
    lines = [
        "| whole step, random w4 weights | context | step | limit | block (draft and verify) | tokens/s at τ 4, 6, 8 |",
        "|---|---|---|---|---|---|",
    ]
    for file in sorted(RESULTS.glob("h100-*-step.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        for row in report["rows"]:
            rates = ", ".join(f"{row['tok_s_at_accept_length'][length]:.0f}" for length in ("4", "6", "8"))
            lines.append(
                f"| {report['model'].partition(',')[0]} | {row['context']:,} | {row['step_ms']:.1f} ms "
                f"| {row['limit_ms']:.1f} ms | {row['block_ms']:.1f} ms | {rates} |"
            )
    return lines


if __name__ == "__main__":
    main()
