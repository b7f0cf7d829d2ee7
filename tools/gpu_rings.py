"""Layers with a window and keys that follow from values on the device: turns, rollbacks and forks of a random model.

Part of tools/gpu_check.py's model paths. An engine with rings and DFlash is compared with one that keeps all tokens and
does not draft, in f32, so that no difference of the last bits turns a token.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.random_models import random_target
from dflash_jax.bench.haystack import NEEDLES, conversation
from dflash_jax.engine.engine import Engine
from dflash_jax.engine.loading import Model
from dflash_jax.engine.profile import Profile
from dflash_jax.engine.request import Result
from dflash_jax.models.config import LayerConfig, ModelConfig, RopeConfig
from dflash_jax.models.decoder import Decoder
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.ring import Ring

_WINDOWS = (1024, 512, None, 1024)
_CONTEXT, _CHARACTERS, _ANSWER = 16_384, 24_000, 700


class _KeepAll(Profile):
    """The profile without rings."""

    def ring(self, config: ModelConfig, pages_per_sequence: int) -> Ring | None:
        return None


def rings_row(model: Model, drafter_for: Callable[[Model], Drafter]) -> dict[str, Any]:
    """Tokens of five turns with and without rings. `model` gives tokenizer, template and profile."""
    profile = dataclasses.replace(model.profile, dtype=jnp.dtype(jnp.float32))
    config = _config(model.target.config)
    target = Decoder(config, random_target(config), dtype=profile.dtype)
    model = dataclasses.replace(model, target=target, profile=profile, drafter=None, scorer=None)
    whole = dataclasses.replace(model, profile=_KeepAll(**vars(profile)))
    options = {"pflash": "off", "context_length": _CONTEXT, "max_sessions": 1}
    with (
        jax.default_matmul_precision("highest"),
        contextlib.closing(
            Engine(dataclasses.replace(model, drafter=drafter_for(model)), dflash="on", **options)
        ) as one,
        contextlib.closing(Engine(whole, dflash="off", **options)) as other,
    ):
        pairs = list(_turns(one, other))
        bytes_of = [sum(leaf.nbytes for leaf in jax.tree.leaves(e._shared.programs.pools.target)) for e in (one, other)]
    equal = [first.token_ids == second.token_ids for first, second in pairs]
    return {
        "check": "rings and keys that follow from values, f32",
        "equal_tokens": equal,
        "cached_tokens": [first.stats.cached_tokens for first, _ in pairs],
        "prompt_tokens": [first.stats.prompt_tokens for first, _ in pairs],
        "pool_bytes": bytes_of,
        "ok": all(equal) and bytes_of[0] < bytes_of[1],
    }


def _turns(one: Engine, other: Engine) -> Iterator[tuple[Result, Result]]:
    """A long answer, the same turn once more, the answer without its beginning, a longer chat, the same beginning."""

    def both(chat: list[dict[str, str]], tokens: int = 40) -> tuple[Result, Result]:
        results = [engine.generate(chat, max_tokens=tokens, ignore_eos=True) for engine in (one, other)]
        return results[0], results[1]

    chat = conversation(_CHARACTERS, NEEDLES[0], depth=0.4)
    long_answer = both(chat, _ANSWER)
    yield long_answer
    yield both(chat)
    chat = [*chat, {"role": "assistant", "content": long_answer[1].text[-80:]}, {"role": "user", "content": "Go on."}]
    yield both(chat, _ANSWER)
    yield both([*chat, {"role": "user", "content": "And then? " * 400}])
    yield both([{"role": "user", "content": chat[0]["content"][: _CHARACTERS // 2]}])


def _config(like: ModelConfig) -> ModelConfig:
    """Sizes that the Triton kernels take, the vocabulary of a model that has a tokenizer."""
    full = RopeConfig(theta=1e6, rotated_pairs=16)
    layers = [
        LayerConfig(head_dim=64, num_kv_heads=4, mlp_width=512, attention_scale=0.125, rope=RopeConfig(), window=window)
        if window
        else LayerConfig(128, num_kv_heads=1, mlp_width=512, attention_scale=0.1, rope=full, values_are_keys=True)
        for window in _WINDOWS
    ]
    return ModelConfig(
        family="gemma4",
        vocab_size=like.vocab_size,
        hidden_size=256,
        num_heads=8,
        layers=tuple(layers),
        norm_eps=1e-6,
        context_length=_CONTEXT,
        tied_embeddings=True,
        stop_ids=like.stop_ids,
        bos_id=like.bos_id,
        qk_norm=True,
        v_norm=True,
    )
