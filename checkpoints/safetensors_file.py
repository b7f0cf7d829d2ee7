"""Safetensors files: what the header says, checked against the file, and tensors or some rows of them.

The layout is a length u64, that many bytes of JSON, and the data: https://github.com/huggingface/safetensors.
The safetensors package hands numpy no 8-bit floats, so that files are read here.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATS = ("F32", "F16", "BF16")
"""What plain weights are stored in."""
_LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors package refuses longer ones too."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    place: int
    """Of its first byte in the file."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` along the first axis, in the stored dtype. Raises CheckpointError."""
        dtype = np.dtype(_DTYPES[self.dtype])
        shape = (len(range(self.shape[0])[start:stop]), *self.shape[1:]) if self.shape else ()
        skipped = start * math.prod(self.shape[1:]) * dtype.itemsize
        size = math.prod(shape) * dtype.itemsize
        try:
            content = np.fromfile(self.file, np.uint8, size, offset=self.place + skipped)
        except OSError as error:
            raise CheckpointError(f"{self.file}: {error.strerror}") from error
        if len(content) < size:
            _refuse(self.file, f"tensor {self.name} ends early")
        return content.view(dtype).reshape(shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows as f32."""
        return np.asarray(self.read(start, stop)).astype(np.float32)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, by its name there. Raises CheckpointError for a file that does not hold what it says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                _refuse(file, f"its header claims {length} bytes, the file has {size}")
            text = opened.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        _refuse(file, f"its header is not JSON: {str(error).splitlines()[0]}", error)
    if not isinstance(header, dict):
        _refuse(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    spans = [_span(file, name, entry, size - 8 - length) for name, entry in header.items()]
    spans.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            _refuse(file, f"tensors {first!r} and {second!r} overlap")
    return {
        name: StoredTensor(file, name, header[name]["dtype"], tuple(header[name]["shape"]), 8 + length + begin)
        for begin, _, name in spans
    }


def _span(file: Path, name: str, entry: Any, available: int) -> tuple[int, int, str]:
    """First and last byte of a tensor within the data, checked against its dtype, its shape and the file."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        _refuse(file, f"tensor {name!r} has no shape or no place")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {dtype!r}; supported: {', '.join(_DTYPES)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        _refuse(file, f"tensor {name!r} has {end - begin} bytes for shape {shape} of {dtype}")
    if end > available:
        _refuse(file, f"tensor {name!r} ends at byte {end} of {available}")
    return begin, end, name


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _refuse(file: Path, reason: str, cause: BaseException | None = None) -> NoReturn:
    raise CheckpointError(f"{file} is damaged or truncated: {reason}; fetch it again") from cause
