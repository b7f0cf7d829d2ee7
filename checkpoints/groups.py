"""Tensor groups: what a conversion reads, encodes, writes and forgets together.

A group is a run of neighbouring tensors, or some rows of one that is too big to be held at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dflash_jax.models.parameters import Parameter

PIECE_BYTES = 512 << 20
"""f32 bytes that are held at once: a tensor with more is cut into pieces of rows."""
_RUN_BYTES = (64 << 20, 256 << 20)
"""f32 bytes of a run of tensors: about a layer's, within these bounds. Each group costs some 50 ms to write."""
_ALIGNMENT = 128
"""Rows of a piece are a multiple of this, so that pieces begin at whole blocks and heads."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a tensor, of `rows` that it has."""

    tensor: str
    start: int
    stop: int
    rows: int

    @property
    def whole(self) -> bool:
        """Whether these are all rows."""
        return (self.start, self.stop) == (0, self.rows)

    def __str__(self) -> str:
        return self.tensor if self.whole else f"{self.tensor} rows {self.start}-{self.stop}"


@dataclasses.dataclass(frozen=True)
class Group:
    """Pieces that are stored together, in a folder of this name."""

    name: str
    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        first, last = self.pieces[0], self.pieces[-1]
        return f"{self.name} ({first})" if first is last else f"{self.name} ({first} to {last})"

    def to_json(self) -> list[list[Any]]:
        """The pieces as written to a manifest."""
        return [list(dataclasses.astuple(piece)) for piece in self.pieces]

    @classmethod
    def from_json(cls, name: str, pieces: list[list[Any]]) -> Group:
        """Reads what `to_json` wrote; TypeError or ValueError for anything else."""
        read = [Piece(str(tensor), int(start), int(stop), int(rows)) for tensor, start, stop, rows in pieces]
        if not read:
            raise ValueError(f"group {name} is empty")
        return cls(name, tuple(read))


def plan(table: Mapping[str, Parameter], piece_bytes: int = PIECE_BYTES) -> list[Group]:
    """The groups of all parameters, in their order."""
    least, most = _RUN_BYTES
    layers = len({name.split(".")[1] for name in table if name.startswith("layers.")})
    a_layer = sum(map(f32_bytes, table.values())) // max(1, layers)
    limit = min(max(a_layer, least), most, piece_bytes)
    runs: list[list[Piece]] = []
    used = limit
    for name, parameter in table.items():
        size = f32_bytes(parameter)
        for piece in _pieces(name, parameter, piece_bytes):
            if used + size > limit or not piece.whole:
                runs.append([])
                used = 0
            runs[-1].append(piece)
            used += size
    return [Group(f"{index:04d}", tuple(run)) for index, run in enumerate(runs)]


def f32_bytes(parameter: Parameter) -> int:
    """Bytes of a parameter as f32."""
    return 4 * math.prod(parameter.shape)


def _pieces(name: str, parameter: Parameter, piece_bytes: int) -> Iterator[Piece]:
    rows = parameter.shape[0]
    step = rows
    if parameter.matrix and f32_bytes(parameter) > piece_bytes:
        step = max(1, piece_bytes * rows // f32_bytes(parameter))
        step = step // _ALIGNMENT * _ALIGNMENT or step
    for start in range(0, rows, step):
        yield Piece(name, start, min(start + step, rows), rows)
