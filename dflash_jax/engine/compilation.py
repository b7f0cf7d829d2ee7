"""The persistent compilation cache, and a count of compilations: one while serving is a bug that a metric shows."""

from __future__ import annotations

import itertools

import jax

from checkpoints import cache_folder

_compiled = itertools.count()
_seen = 0


def enable_persistent_cache() -> None:
    """Keeps compiled programs in the cache folder.

    Does nothing if JAX was told of another place or the folder cannot be written.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    folder = cache_folder() / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def compilations() -> int:
    """Programs compiled or fetched from the cache since this module was imported."""
    return _seen


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    global _seen
    if event == "/jax/core/compile/backend_compile_duration":
        _seen = next(_compiled) + 1


jax.monitoring.register_event_duration_secs_listener(_listen)
