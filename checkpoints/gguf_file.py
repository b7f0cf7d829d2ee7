"""GGUF files: metadata and places of tensors, every count checked against the file before anything is allocated.

The layout is documented in ggml's docs/gguf.md. The gguf package reads headers too, but believes the counts in them;
it knows the quantised blocks, which it decodes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np

from checkpoints.errors import CheckpointError

TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
"""Types of tensors that are read; all but the first three are blocks that the gguf package decodes."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DECODED_BYTES = 16 << 20
"""f32 bytes that are decoded together."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One entry of the metadata."""

    value: Any

    def contents(self) -> Any:
        """A number, a text or a list of either."""
        return self.value


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies; its shape as numpy has it."""

    file: Path
    name: str
    type: str
    shape: tuple[int, ...]
    place: int
    """Of its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of what one step along the first axis spans."""
        block, size = _block(self.type)
        return math.prod(self.shape[1:] or self.shape) // block * size

    @property
    def bytes(self) -> int:
        """All its bytes."""
        return self.row_bytes * (self.shape[0] if len(self.shape) > 1 else 1)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Entries `start` to `stop` along the first axis, f32. Raises CheckpointError."""
        if len(self.shape) == 1:
            return self._decode(0, 1, self.shape)[start:stop]
        result = np.empty((stop - start, *self.shape[1:]), np.float32)
        step = max(1, _DECODED_BYTES // (4 * math.prod(self.shape[1:])))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            result[first - start : last - start] = self._decode(first, last, (last - first, *self.shape[1:]))
        return result

    def _decode(self, start: int, stop: int, shape: tuple[int, ...]) -> np.ndarray:
        size = (stop - start) * self.row_bytes
        try:
            content = np.fromfile(self.file, np.uint8, size, offset=self.place + start * self.row_bytes)
            if len(content) < size:
                _refuse(self.file, f"tensor {self.name} ends early")
            dtype = {"F32": np.float32, "F16": np.float16}.get(self.type, np.uint8)
            rows = content.view(dtype).reshape(*shape[:-1], -1)
            return np.asarray(gguf.dequantize(rows, gguf.GGMLQuantizationType[self.type]), np.float32).reshape(shape)
        except OSError as error:
            raise CheckpointError(f"{self.file}: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """What the header of a file says."""

    path: Path
    fields: dict[str, Field]
    tensors: dict[str, GgufTensor]


def read_header(path: Path) -> GgufFile:
    """The header of a .gguf file. Raises CheckpointError for a file that does not hold what it says."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise CheckpointError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Header(path, content).read()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


class _Header:
    """A cursor over the bytes of a file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.place, self.size = path, content, 4, len(content)

    def read(self) -> GgufFile:
        version = self.number("I")
        if version not in (2, 3):
            why = "big-endian files are not read" if version & 0xFFFF == 0 else "versions 2 and 3 are read"
            raise CheckpointError(f"{self.path} is damaged or truncated, or of version {version}: {why}")
        tensor_count, field_count = self.number("Q"), self.number("Q")
        fields: dict[str, Field] = {}
        for _ in range(self.possible(field_count, 13)):
            name = self.text()
            if name in fields:
                _refuse(self.path, f"metadata {name!r} appears twice")
            fields[name] = Field(self.value(self.number("I")))
        found = [self.tensor() for _ in range(self.possible(tensor_count, 32))]
        alignment = fields["general.alignment"].contents() if "general.alignment" in fields else 32
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            _refuse(self.path, f"general.alignment is {alignment!r}")
        data = -(-self.place // alignment) * alignment
        tensors = [dataclasses.replace(tensor, place=tensor.place + data) for tensor in found]
        self.check(tensors)
        return GgufFile(self.path, fields, {tensor.name: tensor for tensor in tensors})

    def check(self, tensors: list[GgufTensor]) -> None:
        """Every tensor lies within the file and on no other."""
        spans = sorted((tensor.place, tensor.place + tensor.bytes, tensor.name) for tensor in tensors)
        for _, end, name in spans:
            if end > self.size:
                _refuse(self.path, f"tensor {name!r} ends at byte {end} of {self.size}")
        for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
            if begin < end:
                _refuse(self.path, f"tensors {first!r} and {second!r} overlap")
        if len({name for _, _, name in spans}) < len(spans):
            _refuse(self.path, "a tensor appears twice")

    def tensor(self) -> GgufTensor:
        """Its place is within the data as yet."""
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= 4:
            _refuse(self.path, f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        kind, place = self.number("I"), self.number("Q")
        try:
            type_name = gguf.GGMLQuantizationType(kind).name
        except ValueError:
            type_name = f"number {kind}"
        if type_name not in TYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {type_name}, which is not supported; supported: "
                f"{', '.join(TYPES)}"
            )
        if 0 in shape or shape[-1] % _block(type_name)[0]:
            _refuse(self.path, f"tensor {name!r} of type {type_name} has shape {list(shape)}")
        return GgufTensor(self.path, name, type_name, shape, place)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            _refuse(self.path, f"metadata has type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            code = _NUMBERS[inner]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
        if inner != _STRING:
            _refuse(self.path, f"metadata has an array of type {inner}")
        return [self.text() for _ in range(self.possible(count, 8))]

    def text(self) -> str:
        content = self.take(self.number("Q"))
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            _refuse(self.path, "a text in it is not UTF-8", error)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def take(self, count: int) -> bytes:
        if count > self.size - self.place:
            _refuse(self.path, f"its header claims {count} bytes, {self.size - self.place} are left")
        self.place += count
        return self.content[self.place - count : self.place]

    def possible(self, count: int, least: int) -> int:
        """A count of things that take `least` bytes each, if the file can hold so many."""
        if count * least > self.size - self.place:
            _refuse(self.path, f"its header claims {count} entries, {self.size - self.place} bytes are left")
        return count


def _block(type_name: str) -> tuple[int, int]:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]


def _refuse(path: Path, reason: str, cause: BaseException | None = None) -> NoReturn:
    raise CheckpointError(f"{path} is damaged or truncated: {reason}; fetch it again") from cause
