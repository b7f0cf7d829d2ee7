"""A checkpoint as it was published: its config, and its tensors under our names, read one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.groups import Group, Piece
from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.parameters import Parameter, drafter_parameters, target_parameters

Reader = Callable[[], np.ndarray]
"""Reads one tensor, f32, matrices as [out, in]. A RowReader spares memory where tensors are huge."""


@runtime_checkable
class RowReader(Protocol):
    """A reader that can also read rows `start` to `stop` alone."""

    def __call__(self) -> np.ndarray:
        """The whole tensor."""
        ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some of its rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the parameters of one network come from, by canonical names; `origin` has the source's own names."""

    path: Path
    config: ModelConfig | DrafterConfig
    shapes: Mapping[str, tuple[int, ...]]
    readers: Mapping[str, Reader]
    origin: Mapping[str, str]
    tokenizer_json: str | None = None
    chat_template: str | None = None
    skipped: tuple[str, ...] = ()
    """The source's names of tensors that nobody reads: other modalities, copies."""

    @property
    def table(self) -> dict[str, Parameter]:
        """The parameters that the config asks for."""
        return parameter_table(self.config)

    def check(self) -> None:
        """Raises CheckpointError for a tensor that is missing, left over or of another shape than the config says."""
        table = self.table
        for name, parameter in table.items():
            if name not in self.readers:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is missing; the file is incomplete or of another family"
                )
            found = self.shapes[name]
            if found != parameter.shape:
                raise CheckpointError(
                    f"{self.path}: tensor {self.origin[name]} has shape {list(found)}, "
                    f"the config asks for {list(parameter.shape)}; config and weights do not belong together"
                )
        extra = sorted(set(self.readers) - set(table))
        if extra:
            raise CheckpointError(
                f"{self.path}: tensor {self.origin[extra[0]]} has no place in a {family(self.config)} model"
            )

    def read(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Iterator[tuple[str, Parameter, np.ndarray]]]]:
        """The pieces of every group, in turn; each is read when it is asked for and forgotten afterwards."""
        table, last = self.table, _LastTensor()
        for group in groups:
            yield group, ((piece.tensor, table[piece.tensor], self._rows(piece, last)) for piece in group.pieces)

    def _rows(self, piece: Piece, last: _LastTensor) -> np.ndarray:
        reader = self.readers[piece.tensor]
        if piece.whole:
            last.forget()
            return reader()
        if isinstance(reader, RowReader):
            return reader.rows(piece.start, piece.stop)
        values = last.read(piece.tensor, reader)[piece.start : piece.stop]
        if piece.stop == piece.rows:
            last.forget()
        return values


class _LastTensor:
    """A tensor that comes in pieces from a reader that only reads all of it."""

    def __init__(self) -> None:
        self.name, self.values = "", np.empty(0)

    def read(self, name: str, reader: Reader) -> np.ndarray:
        if name != self.name:
            self.forget()
            self.name, self.values = name, reader()
        return self.values

    def forget(self) -> None:
        self.name, self.values = "", np.empty(0)


def parameter_table(config: ModelConfig | DrafterConfig) -> dict[str, Parameter]:
    """Names and shapes of a target's or a drafter's parameters."""
    return target_parameters(config) if isinstance(config, ModelConfig) else drafter_parameters(config)


def family(config: ModelConfig | DrafterConfig) -> str:
    """What a model is called in messages."""
    return config.family if isinstance(config, ModelConfig) else "DFlash drafter"
