"""The `usage` object of an answer: OpenAI's fields and ours."""

from __future__ import annotations

import dataclasses
from typing import Any

from dflash_jax.engine.request import Stats


def usage(stats: Stats) -> dict[str, Any]:
    """`pflash` is null when nothing was scored, `dflash` when nothing was drafted."""
    dflash = stats.dflash and {
        "verify_steps": stats.dflash.verify_steps,
        "committed_tokens": stats.dflash.committed_tokens,
        "accept_length": stats.dflash.accept_length,
    }
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
        "pflash": dataclasses.asdict(stats.pflash) if stats.pflash else None,
        "dflash": dflash,
    }
