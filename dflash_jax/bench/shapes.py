"""`dflash-jax bench decode --shape`: steps of a big model on random 4-bit weights, beside what reading them costs.

No checkpoint is needed: the time of a step does not depend on what the numbers are. Tokens per second follow from the
time of a block and an accept length, which only a real drafter on real text can tell. The tokens of both kinds of steps
are compared all the same.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from checkpoints.formats import stored_bytes, stored_format
from dflash_jax.bench.report import BANDWIDTH, environment, write
from dflash_jax.compress.score import Sparse, early_exit
from dflash_jax.console import progress_bar
from dflash_jax.engine.compilation import enable_persistent_cache
from dflash_jax.engine.profile import profile_for_device
from dflash_jax.engine.programs import Programs, new_slots, sampling_parameters
from dflash_jax.engine.room import weight_bytes
from dflash_jax.models.config import DrafterConfig, ModelConfig, RopeConfig
from dflash_jax.models.decoder import Decoder
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.hf_config import from_hf
from dflash_jax.models.parameters import Parameter, drafter_parameters, target_parameters
from dflash_jax.speculate.pace import PLAIN
from dflash_jax.speculate.step import Slots
from pallas_kernels.quantised_matmul.api import W4, W8

_GEMMA4 = {
    "model_type": "gemma4_text",
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 262_144,
}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
TARGETS: dict[str, dict[str, Any]] = {
    "gemma4-31b": {
        **_GEMMA4,
        "num_hidden_layers": 60,
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
    },
    "gemma4-12b": {
        **_GEMMA4,
        "num_hidden_layers": 48,
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
    },
    "gemma4-26b": {
        **_GEMMA4,
        "num_hidden_layers": 30,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "qwen3-8b": {
        **_QWEN3,
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40_960,
    },
}
"""Published sizes, in the spelling of their config.json."""
_DRAFTERS: dict[str, dict[str, Any]] = {
    "gemma4-31b": {"heads": (64, 8), "width": 10_752, "targets": (1, 12, 23, 35, 46, 57)},
    "gemma4-12b": {"heads": (32, 8), "width": 7680, "targets": (5, 17, 29, 41, 46)},
    "gemma4-26b": {"heads": (32, 8), "width": 5632, "targets": (1, 6, 11, 17, 22, 27)},
    "qwen3-8b": {"heads": (32, 8), "width": 12_288, "targets": (1, 9, 17, 25, 33)},
}
_DRAFTER_LAYERS, _DRAFTER_WINDOW = 5, 2048
_ACCEPT_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8)
_NIBBLE_DEVIATION, _BYTE_DEVIATION = 4.6, 74.0
"""Standard deviations of random nibbles and bytes."""
_STEPS = 16


def run(
    shape: str, contexts: Sequence[int], json_file: Path | None = None, *, tree: int | None = None
) -> dict[str, Any]:
    """Times plain steps and blocks (draft and verify) at each context, prints a table, returns the report.

    The rows of a block are a `tree` of so many or, with 0, a chain; None is what an engine does.
    """
    enable_persistent_cache()
    config = from_hf(TARGETS[shape])
    with progress_bar() as progress:
        progress("random weights", 0, 0)
        programs, sizes = random_programs(shape, max(contexts), tree=tree)
        rows = []
        for context in contexts:
            progress(f"context {context}", len(rows), len(contexts))
            rows.append(_row(programs, config, context, sizes))
    model = f"{shape} and drafter, random w4 weights"
    report = {**environment(), "model": model, "tree": programs.profile.tree_rows, "rows": rows}
    _print(report)
    write(json_file, report)
    return report


def random_programs(
    shape: str, longest: int, *, tree: int | None = None, sparse: Sparse | None = None
) -> tuple[Programs, tuple[int, int]]:
    """Programs of a shape's target and drafter for contexts up to `longest` tokens, and the bytes of what each reads.

    Experts are not among these bytes.
    """
    config = from_hf(TARGETS[shape])
    profile = profile_for_device().with_tree(tree)
    target = Decoder(config, _parameters(target_parameters(config), "w4"), dtype=profile.dtype)
    drafter_config = _drafter_config(shape, config)
    drafter = Drafter(drafter_config, _parameters(drafter_parameters(drafter_config), "w4"), dtype=profile.dtype)
    pages = -(-(longest + _STEPS * profile.block_rows[-1] * 8) // profile.page_size)
    ring = profile.ring(config, pages)
    programs = Programs(
        target,
        drafter,
        None,
        early_exit(config),
        profile=profile,
        num_pages=pages + 1,
        pages_per_sequence=pages,
        ring=ring,
        num_ring_pages=ring.width + 1 if ring else 1,
        sparse=sparse,
    )
    return programs, (weight_bytes(target) - _expert_bytes(config), weight_bytes(drafter))


def _row(programs: Programs, config: ModelConfig, context: int, sizes: tuple[int, int]) -> dict[str, Any]:
    kinds = (PLAIN, programs.block_rows[-1])
    (step, plain, first_step), (block, drafted, first_block) = (_visit(programs, context, rows) for rows in kinds)
    kv = _kv_bytes(config, context, programs.profile.dtype.itemsize)
    bandwidth = BANDWIDTH.get(jax.devices()[0].device_kind)
    drafting = sizes[1] + _head_bytes(config)
    limit, block_limit = (
        (sizes[0] + kv + read + _expert_bytes(config, rows)) / bandwidth if bandwidth else None
        for rows, read in ((1, 0), (kinds[1], drafting))
    )
    return {
        "context": context,
        "rows": programs.profile.plain_rows,
        "step_ms": round(1000 * step, 3),
        "limit_ms": round(1000 * limit, 3) if limit else None,
        "block_ms": round(1000 * block, 3),
        "block_limit_ms": round(1000 * block_limit, 3) if block_limit else None,
        "first_steps_s": round(first_step, 2),
        "first_blocks_s": round(first_block, 2),
        "equal_tokens": plain.tolist() == drafted[: len(plain)].tolist(),
        "tok_s_at_accept_length": {str(length): round(length / block, 1) for length in _ACCEPT_LENGTHS},
    }


def _visit(programs: Programs, context: int, rows: int) -> tuple[float, np.ndarray, float]:
    """Seconds of a step, the best of a few visits, the tokens of a visit, and seconds of the first visit.

    The first visit to a program traces it, and compiles it or finds it in the cache.
    """
    seconds, best, tokens = [], math.inf, np.zeros(0, np.int32)
    for _ in range(4):
        slots = slots_at(programs, context)
        started = time.perf_counter()
        visit, _ = programs.decode(slots, sampling_parameters(temperature=0.0), rows, max_steps=_STEPS)
        steps = int(visit.steps)
        seconds.append(time.perf_counter() - started)
        best = min(best, seconds[-1] / steps)
        tokens = np.asarray(visit.tokens)[0, : int(visit.count[0])]
    return best, tokens, seconds[0]


def slots_at(programs: Programs, context: int) -> Slots:
    """A sequence that is alone, goes on behind so many tokens, and does not end."""
    return new_slots(programs.whole_tables(), length=context, position=context, anchor=5, limit=1 << 20, stop_ids=())


def _parameters(table: dict[str, Parameter], weights: str) -> dict[str, Any]:
    """Random parameters in the formats of a conversion to `weights`, made on the device.

    Activations keep their size from layer to layer.
    """
    made: dict[str, Any] = {}
    for index, (name, parameter) in enumerate(table.items()):
        key, kind = jax.random.key(index), stored_format(name, parameter, weights)
        if kind == "f32":
            ones = len(parameter.shape) == 1  # a router is the only matrix among them
            make = jnp.ones if ones else functools.partial(jax.random.normal, key)
            made[name] = make(parameter.shape, jnp.float32)
            continue
        outputs, inputs = parameter.shape
        if kind == "w4":
            words = jax.random.bits(key, (-(-inputs // 128) * 32, outputs), jnp.uint16).view(jnp.int16)
            scale = 1 / (_NIBBLE_DEVIATION * inputs**0.5)
            made[name] = W4(words, jnp.full((-(-inputs // 128) * 4, outputs), scale, jnp.float16), 32)
        elif kind == "w8":
            values = jax.random.bits(key, parameter.shape, jnp.uint8).view(jnp.int8)
            made[name] = W8(values, jnp.full(outputs, 1 / (_BYTE_DEVIATION * inputs**0.5), jnp.float32))
        else:
            made[name] = jax.random.normal(key, parameter.shape, jnp.bfloat16) * jnp.bfloat16(inputs**-0.5)
    return made


def _drafter_config(shape: str, config: ModelConfig) -> DrafterConfig:
    sizes = _DRAFTERS[shape]
    heads, kv_heads = sizes["heads"]
    return DrafterConfig(
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        mlp_width=sizes["width"],
        norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        block_size=16,
        mask_id=4,
        target_layers=sizes["targets"],
        windows=(_DRAFTER_WINDOW,) * (_DRAFTER_LAYERS - 1) + (None,),
        causal=(True,) * (_DRAFTER_LAYERS - 1) + (False,),
        num_target_layers=config.num_layers,
        vocab_size=config.vocab_size,
    )


def _head_bytes(config: ModelConfig) -> int:
    """The target's head in 8 bits, which drafting reads once more."""
    return config.vocab_size * config.hidden_size


def _expert_bytes(config: ModelConfig, rows: int | None = None) -> int:
    """All experts in 4 bits, or those that so many rows read, as expected when every choice is equally likely."""
    if config.experts is None:
        return 0
    table = target_parameters(config)
    names = [name for name in table if name.endswith(("experts.gate_up", "experts.down"))]
    everything = sum(stored_bytes(name, table[name], "w4", 32) for name in names)
    unread = 0.0 if rows is None else (1 - config.experts.active / config.experts.count) ** rows
    return round(everything * (1 - unread))


def _kv_bytes(config: ModelConfig, context: int, width: int) -> int:
    """K and V that a step reads: all tokens on full layers, a window of them on the others."""
    return width * sum(min(context, layer.window or context) * config.kv_numbers(layer) for layer in config.layers)


def _print(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['model']} on {report['device']}")
    for title in ("context", "step ms", "limit ms", "of limit", "block ms", "equal tokens", "tok/s at τ 1, 4, 6, 8"):
        table.add_column(title, justify="right")
    for row in report["rows"]:
        share = f"{100 * row['limit_ms'] / row['step_ms']:.0f} %" if row["limit_ms"] else "-"
        rates = row["tok_s_at_accept_length"]
        rate_cell = ", ".join(f"{rates[length]:.0f}" for length in ("1", "4", "6", "8"))
        cells = (
            row["context"],
            row["step_ms"],
            row["limit_ms"] or "-",
            share,
            row["block_ms"],
            row["equal_tokens"],
            rate_cell,
        )
        table.add_row(*map(str, cells))
    Console().print(table)
