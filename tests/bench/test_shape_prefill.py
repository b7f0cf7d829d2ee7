"""`bench prefill --shape`, with a shape that a CPU reads in no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dflash_jax.bench import shape_prefill, shapes
from dflash_jax.cli import main
from dflash_jax.engine.programs import Programs
from dflash_jax.models.hf_config import from_hf

TINY = {
    **shapes._QWEN3,
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}


@pytest.mark.slow
def test_a_prompt_is_read_with_and_without_pflash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(shapes.TARGETS, "qwen3-8b", TINY)
    monkeypatch.setitem(shapes._DRAFTERS, "qwen3-8b", {"heads": (2, 1), "width": 128, "targets": (0,)})
    read: list[int] = []
    prefill = Programs.prefill_chunk
    monkeypatch.setattr(
        Programs, "prefill_chunk", lambda self, ids, *rest: (read.append(len(ids)), prefill(self, ids, *rest))[1]
    )
    file = tmp_path / "report.json"
    arguments = ["--shape", "qwen3-8b", "--random", "--context", "600", "--keep-ratio", "0.5"]
    files = ["--json", str(file), "--plot", str(tmp_path / "report.png")]
    found = CliRunner().invoke(main, ["bench", "prefill", *arguments, *files])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    (row,) = json.loads(file.read_text())["rows"]
    kept = row["kept_tokens"]
    assert row["prompt_tokens"] == 600 and 0.8 * 316 < kept <= 316  # 32 and half of the others at most, in whole chunks
    assert 0 < row["score_s"] < row["ttft_s_pflash"] and row["ttft_s_plain"] > 0
    assert sum(read[-3:]) == kept - 1 and sum(read) > 599 + kept - 1  # the last token is the first step's


def test_operations_of_the_31b_shape() -> None:
    """31 billion weights, and 10 of 60 layers that see everything."""
    config = from_hf(shapes.TARGETS["gemma4-31b"])
    short, long = (shape_prefill._operations(config, tokens) for tokens in (1, 131_072))
    assert 29e9 < short / 2 < 31e9
    everything, windows = 4 * 32 * 512 * 131_072**2 / 2, 4 * 32 * 256 * 131_072 * 1024
    assert long == pytest.approx(131_072 * short + 10 * everything + 50 * windows, rel=0.01)


def test_shape_and_random_belong_together() -> None:
    for command in ("prefill", "decode"):
        for arguments in (["--shape", "qwen3-8b"], ["--random"]):
            found = CliRunner().invoke(main, ["bench", command, *arguments])
            assert found.exit_code == 2 and "--shape and --random belong together" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefill", "--shape", "qwen3-8b", "--random", "--scorer", "x"], "--scorer does not go with --shape"),
        (["prefill", "--shape", "qwen3-8b", "--random", "my-model"], "MODEL does not go with --shape"),
        (["decode", "--shape", "qwen3-8b", "--random", "--limit", "3"], "--limit does not go with --shape"),
        (["prefill", "--context", "600"], "--context goes with --shape only"),
        (["decode", "my-model", "--context", "600"], "--context goes with --shape only"),
    ],
)
def test_what_would_be_ignored_is_refused(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(main, ["bench", *arguments])
    assert found.exit_code == 2 and message in found.output
