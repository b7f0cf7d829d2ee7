"""Converted folders: config.json, tokenizer.json, chat_template.jinja and the weights as an Orbax store.

A folder is written under a temporary name beside its place and renamed when everything is on the disk. Whatever stops a
conversion, the place holds the old folder, the new one, or nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from checkpoints.errors import CheckpointError
from checkpoints.source import parameter_table
from dflash_jax.models.config import DrafterConfig, ModelConfig
from pallas_kernels.quantised_matmul.api import W4, W8, Weight

FORMAT = "dflash-jax/1"
"""Written to config.json; a folder of another version must be converted again."""

_WEIGHTS = "weights"
_SAYS_FULL = re.compile(r"No space left|ENOSPC|Disk quota exceeded")


def is_converted(path: Path) -> bool:
    """Whether a folder was written through `new_folder`, by this or another version."""
    try:
        description = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(description, dict) and str(description.get("format", "")).startswith("dflash-jax/")


def read_description(path: Path) -> tuple[dict[str, Any], ModelConfig | DrafterConfig]:
    """config.json of a converted folder: the whole object, and the record in it. Raises CheckpointError."""
    file = path / "config.json"
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}; convert the model again") from error
    found = description.get("format") if isinstance(description, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found!r}, this version reads {FORMAT!r}: convert the model again")
    lacking = [name for name in ("role", "weights", "group_size", "config") if name not in description]
    if lacking:
        raise CheckpointError(f"{file} lacks the field {lacking[0]}: convert the model again")
    record = DrafterConfig if description.get("role") == "drafter" else ModelConfig
    return description, record.from_json(json.dumps(description.get("config")))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that takes the place `out` when the block ends well, and vanishes when it does not.

    Raises CheckpointError when `out` holds something else than a converted folder, and when the disk is full.
    """
    if out.exists() and not is_converted(out):
        raise CheckpointError(f"{out} exists and is not a converted folder: choose another place or remove it")
    temporary = _beside(out, "new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        temporary.mkdir()
        yield temporary
        _flush(temporary)
        _replace(temporary, out)
    except (OSError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # Orbax reports a full disk as a ValueError, in the words of its storage library.
        if full or _SAYS_FULL.search(str(error)):
            raise CheckpointError(
                f"the disk of {out.parent} is full: free some space or choose another place"
            ) from error
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {out}: {error.strerror or error}; choose another place") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(folder: Path, parameters: Mapping[str, Weight]) -> None:
    """The Orbax store of a folder."""
    tree = {name: _parts(weight) for name, weight in parameters.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / _WEIGHTS).absolute(), tree)


def write_texts(
    folder: Path,
    config: ModelConfig | DrafterConfig,
    facts: Mapping[str, Any],
    tokenizer_json: str | None,
    chat_template: str | None,
) -> None:
    """Everything but the weights. `facts` are role, weights format and group size."""
    description = {"format": FORMAT, **facts, "config": json.loads(config.to_json())}
    (folder / "config.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    if tokenizer_json is not None:
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def read_weights(path: Path, config: ModelConfig | DrafterConfig, weights: str, group_size: int) -> dict[str, Weight]:
    """The parameters of a converted folder, on the default device. Raises CheckpointError."""
    store = (path / _WEIGHTS).absolute()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(store).item_metadata
            abstract = {
                name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), parts)
                for name, parts in dict(found).items()
            }
            tree = checkpointer.restore(store, abstract)
    except Exception as error:  # Orbax and its storage library fail in many ways on damaged stores
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{store} is damaged: {reason}; convert the model again") from error
    missing = sorted(set(parameter_table(config)) - set(tree))
    if missing:
        raise CheckpointError(f"{store} lacks tensor {missing[0]}: convert the model again")
    return {name: _join(parts, group_size) for name, parts in tree.items()}


def _parts(weight: Weight) -> Any:
    if isinstance(weight, W8):
        return {"values": np.asarray(weight.values), "scales": np.asarray(weight.scales)}
    if isinstance(weight, W4):
        return {"packed": np.asarray(weight.packed), "scales": np.asarray(weight.scales)}
    return np.asarray(weight)


def _join(parts: Any, group_size: int) -> Weight:
    if not isinstance(parts, dict):
        return jnp.asarray(parts)
    if "values" in parts:
        return W8(values=parts["values"], scales=parts["scales"])
    return W4(packed=parts["packed"], scales=parts["scales"], group_size=group_size)


def _flush(folder: Path) -> None:
    for file in [*folder.rglob("*"), folder]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(temporary: Path, out: Path) -> None:
    if not out.exists():
        try:
            temporary.rename(out)
            return
        except OSError:
            if not is_converted(out):  # somebody else may have finished the same conversion
                raise
    old = _beside(out, "old")
    out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _beside(out: Path, label: str) -> Path:
    """A name beside `out` that says which process made it; no two conversions share one."""
    return out.with_name(f".{out.name}.{os.getpid()}.{label}-{secrets.token_hex(4)}.tmp")


def _remove_leftovers(out: Path) -> None:
    for leftover in out.parent.glob(f".{out.name}.*.tmp"):
        process = leftover.name.removeprefix(f".{out.name}.").split(".")[0]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
