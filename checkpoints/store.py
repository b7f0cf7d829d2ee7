"""Converted folders: config.json, tokenizer.json, chat_template.jinja and the weights, an Orbax checkpoint per group.

How a folder comes to be is told in checkpoints/unfinished.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from jaxtyping import Array

from checkpoints.errors import CheckpointError
from checkpoints.groups import Group, Piece
from checkpoints.manifest import Manifest, group_bytes, read_manifest
from checkpoints.sharding import Placement
from checkpoints.source import parameter_table
from dflash_jax.console import Bytes, Note
from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.parameters import Parameter
from pallas_kernels.quantised_matmul.api import W4, W8, Weight

FORMAT = "dflash-jax/2"
"""Written to config.json; a folder of another version must be converted again."""

WEIGHTS = "weights"
"""The folder of the groups and their manifest."""

_CHUNK_BYTES = 16 << 20
"""Bytes that are read together: chunks are read side by side, and a device that wants a slice reads little else."""
_ROW_AXIS = {"weight": 0, "values": 0, "row_scales": 0, "packed": 1, "group_scales": 1}


@dataclasses.dataclass(frozen=True)
class Reading:
    """How fast weights came from the disk to their devices."""

    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.bytes / 1e9:.2f} GB at {self.bytes / 1e9 / max(self.seconds, 1e-9):.2f} GB/s"


def is_converted(path: Path) -> bool:
    """Whether a folder was written by `convert`, of this or another version."""
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


def write_group(store: Path, name: str, parameters: Mapping[str, Weight]) -> None:
    """One group of parameters, or of pieces of them, as an Orbax checkpoint of its own: `store / name`."""
    tree = {
        tensor: {part: np.asarray(array) for part, array in split(weight).items()}
        for tensor, weight in parameters.items()
    }
    arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    with _checkpointer() as checkpointer:
        checkpointer.save((store / name).absolute(), ocp.args.PyTreeSave(tree, save_args=arguments))


def read_weights(
    path: Path,
    config: ModelConfig | DrafterConfig,
    group_size: int,
    *,
    placement: Placement | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Weight], Reading]:
    """The parameters of a converted folder, straight to their devices (`placement`), and how fast that went.

    Raises CheckpointError for what is missing or damaged; checksums are `verify`'s matter.
    """
    store, placement = (path / WEIGHTS).absolute(), placement or Placement()
    manifest = read_manifest(store)
    started, done = time.monotonic(), 0
    whole: dict[str, dict[str, Array]] = {}
    checkpointer = _checkpointer()
    for name, entry in manifest.entries.items():
        if progress:
            progress("reading weights", Bytes(done), Bytes(manifest.bytes))
        try:
            _check_size(store / name, entry.bytes)
            tree = _restore(checkpointer, store / name, entry.group, placement)
        except Exception as error:  # Orbax and its storage library fail in many ways on damaged stores
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{store}: group {entry.group} is damaged: {reason}; convert the model again"
            ) from error
        for piece in entry.group.pieces:
            parts = tree[piece.tensor]
            whole[piece.tensor] = parts if piece.whole else _put(whole.get(piece.tensor), parts, piece, placement)
        done += entry.bytes
    checkpointer.close()
    _check_complete(store, manifest, parameter_table(config))
    jax.block_until_ready(whole)
    reading = Reading(done, time.monotonic() - started)
    if progress:
        progress(Note(f"weights read: {reading}"), Bytes(done), Bytes(done))
    return {name: join(parts, group_size) for name, parts in whole.items()}, reading


def split(weight: Weight) -> dict[str, Any]:
    """The arrays of a weight by the names of its parts (checkpoints/sharding.py)."""
    if isinstance(weight, W8):
        return {"values": weight.values, "row_scales": weight.scales}
    if isinstance(weight, W4):
        return {"packed": weight.packed, "group_scales": weight.scales}
    return {"weight": weight}


def join(parts: Mapping[str, Array], group_size: int) -> Weight:
    """The inverse of `split`."""
    if "values" in parts:
        return W8(values=parts["values"], scales=parts["row_scales"])
    if "packed" in parts:
        # Folders of earlier versions have bfloat16 scales: float16 holds those from 6.1e-5 on exactly.
        scales = parts["group_scales"].astype(jnp.float16)
        return W4(packed=parts["packed"], scales=scales, group_size=group_size)
    return parts["weight"]


def _checkpointer() -> ocp.Checkpointer:
    # Weights do not compress, and trying costs most of the time.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False))


def _restore(
    checkpointer: ocp.Checkpointer, folder: Path, group: Group, placement: Placement
) -> dict[str, dict[str, Array]]:
    pieces = {piece.tensor: piece for piece in group.pieces}
    metadata: Any = checkpointer.metadata(folder).item_metadata
    found = dict(metadata.tree)
    if set(found) != set(pieces):
        raise ValueError("it holds other tensors than the manifest says")
    abstract = {
        tensor: {
            part: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype,
                # Where a piece is cut has nothing to do with where devices cut its tensor.
                sharding=placement.sharding(tensor, part, leaf.shape) if pieces[tensor].whole else placement.uncut(),
            )
            for part, leaf in parts.items()
        }
        for tensor, parts in found.items()
    }
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    return checkpointer.restore(folder, ocp.args.PyTreeRestore(item=abstract, restore_args=arguments))


def _put(
    whole: Mapping[str, Array] | None, parts: Mapping[str, Array], piece: Piece, placement: Placement
) -> dict[str, Array]:
    """Rows of a tensor in their place, in memory that the whole tensor owns already."""
    result = {}
    for part, array in parts.items():
        axis = _ROW_AXIS[part]
        shape = (*array.shape[:axis], piece.rows, *array.shape[axis + 1 :])
        sharding = placement.sharding(piece.tensor, part, shape)
        target = (
            whole[part]
            if whole
            else jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, array.dtype)
        )
        result[part] = _put_rows(target, array, jnp.int32(piece.start), axis, sharding)
    return jax.block_until_ready(result)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _put_rows(whole: Array, rows: Array, start: Array, axis: int, sharding: Sharding) -> Array:
    # XLA's CPU path for updates in 16-bit floats is 3 times slower than that for integers.
    plain = jnp.uint16 if whole.dtype in (jnp.bfloat16, jnp.float16) else whole.dtype
    as_plain, as_plain_rows = (jax.lax.bitcast_convert_type(array, plain) for array in (whole, rows))
    placed = jax.lax.dynamic_update_slice_in_dim(as_plain, as_plain_rows, start, axis)
    return jax.lax.with_sharding_constraint(jax.lax.bitcast_convert_type(placed, whole.dtype), sharding)


def _check_size(folder: Path, expected: int) -> None:
    found = group_bytes(folder) if folder.is_dir() else None
    if found != expected:
        raise ValueError("it is missing" if found is None else f"it has {found} bytes instead of {expected}")


def _check_complete(store: Path, manifest: Manifest, table: Mapping[str, Parameter]) -> None:
    rows: Counter[str] = Counter()
    for entry in manifest.entries.values():
        rows.update({piece.tensor: piece.stop - piece.start for piece in entry.group.pieces})
    for name, parameter in table.items():
        if rows[name] != parameter.shape[0]:
            raise CheckpointError(f"{store} lacks tensor {name}: convert the model again")
