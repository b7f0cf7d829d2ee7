"""Model paths on the device: the real default model and a random drafter through prefill, decoding, DFlash and PFlash.

One half of tools/gpu_check.py, which runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_rings import rings_row

from checkpoints.random_models import random_drafter
from dflash_jax.bench.haystack import NEEDLES, conversation
from dflash_jax.engine.engine import Engine
from dflash_jax.engine.loading import Model
from dflash_jax.engine.target import Target
from dflash_jax.models.config import DrafterConfig
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.hf_config import default_target_layers

CHAT = [
    {"role": "user", "content": "Write a Python function that returns the n-th Fibonacci number, with a docstring."}
]


def model_rows(model: Model) -> Iterator[dict[str, Any]]:
    """The rows of all checks as they come. One that ends in an error is a row too, and the others still run."""
    for check in (_logits, _decoding, _pruning, _rings):
        try:
            yield from check(model)
        except Exception as error:
            traceback.print_exc()
            yield {"check": check.__name__.strip("_"), "error": f"{type(error).__name__}: {error}"[:200], "ok": False}


def _logits(model: Model) -> Iterator[dict[str, Any]]:
    """Logits of one whole pass in the device's dtype against the same pass in f32 on the same weights."""
    ids = np.asarray(model.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 20))[None]
    logits = np.asarray(Target(model.target).logits(ids), np.float32)
    wide = jax.tree.map(lambda leaf: leaf, model.target)
    wide.dtype = jnp.dtype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(Target(wide).logits(ids), np.float32)
    agree = float((logits.argmax(-1) == expected.argmax(-1)).mean())
    yield {
        "check": "logits against f32 activations",
        "top1_agree": agree,
        "ok": bool(agree > 0.9 and np.isfinite(logits).all()),
    }


def _decoding(model: Model) -> Iterator[dict[str, Any]]:
    """Plain decoding, and DFlash with a random drafter: the same tokens."""
    drafted = dataclasses.replace(model, drafter=_random_drafter(model))
    answers = {}
    for name, options in (("plain", {"dflash": "off"}), ("DFlash, random drafter", {"dflash": "on"})):
        with contextlib.closing(Engine(drafted, pflash="off", **options)) as engine:
            started = time.perf_counter()
            engine.warm_up()
            warm = time.perf_counter() - started
            engine.generate(CHAT, max_tokens=16)
            result = engine.generate(CHAT, max_tokens=256, ignore_eos=True)
            sampled = engine.generate(CHAT, max_tokens=64, temperature=0.8, top_p=0.9, seed=7, ignore_eos=True)
            answers[name] = (result.token_ids, sampled.token_ids)
            times = engine._shared.times
            yield {
                "check": name,
                "warm_up_s": round(warm, 2),
                "tok_s": round(result.stats.decode_tokens_per_second, 1),
                "step_ms": round(1000 * (times.plain if name == "plain" else times.blocks[max(times.blocks)]), 3),
                "equal_tokens": answers[name] == answers["plain"],
                "text": result.text[:60],
                "ok": answers[name] == answers["plain"],
            }


def _pruning(model: Model) -> Iterator[dict[str, Any]]:
    """A fact hidden in a long conversation, with and without PFlash."""
    longest = min(24_000, 3 * model.target.config.context_length)
    for name, options in (("whole prompt", {"pflash": "off"}), ("PFlash", {"pflash": "on", "keep_ratio": 0.25})):
        with contextlib.closing(Engine(model, max_sessions=1, **options)) as engine:
            engine.warm_up()
            found, seconds, kept = [], [], []
            for index, needle in enumerate(NEEDLES):
                result = engine.generate(conversation(longest, needle, depth=0.4, offset=90_000 * index), max_tokens=24)
                found.append(needle.answer in result.text)
                seconds.append(result.stats.time_to_first_token)
                kept.append(result.stats.pflash.kept_tokens if result.stats.pflash else result.stats.prompt_tokens)
            figures = {
                "found": sum(found),
                "of": len(found),
                "ttft_s": round(float(np.mean(seconds[1:])), 4),
                "kept_tokens": kept,
            }
            yield {"check": name, **figures, "prompt_tokens": result.stats.prompt_tokens, "ok": sum(found) >= 1}


def _rings(model: Model) -> Iterator[dict[str, Any]]:
    yield rings_row(model, _random_drafter)


def _random_drafter(model: Model) -> Drafter:
    target = model.target.config
    layers = default_target_layers(target.num_layers, 1)
    config = DrafterConfig.beside(target, block_size=16, mask_id=0, target_layers=layers, windows=(None, None))
    parameters = {name: value.astype(model.profile.dtype) for name, value in random_drafter(config).items()}
    return Drafter(config, parameters, dtype=model.profile.dtype)
