"""What a drafter learns from: conversations as tokens, and which of them the target wrote as an answer."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

LENGTHS = (512, 1024, 2048)
"""Samples of a batch are padded to one of these: each is a program to compile."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some samples, padded at the end: tokens i32[rows, length], and where they are an answer's, bool[rows, length]."""

    tokens: np.ndarray
    answers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Samples:
    """Conversations one after the other: sample i is `tokens[starts[i] : starts[i + 1]]`."""

    tokens: np.ndarray
    answers: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(rows: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]]) -> Samples:
        """From (tokens, is answer) of every sample."""
        tokens = [np.asarray(tokens, np.int32) for tokens, _ in rows]
        answers = [np.asarray(answers, np.bool_) for _, answers in rows]
        starts = np.cumsum([0, *map(len, tokens)])
        return Samples(
            np.concatenate([np.zeros(0, np.int32), *tokens]), np.concatenate([np.zeros(0, np.bool_), *answers]), starts
        )

    @staticmethod
    def load(file: Path) -> Samples:
        """What `save` wrote. Raises ValueError when the file holds something else."""
        try:
            with file.open("rb") as stream, np.load(stream) as stored:
                tokens, answers, starts = stored["tokens"], stored["answers"], stored["starts"]
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} holds no samples of train-drafter: {error}") from error
        return Samples(tokens.astype(np.int32), np.unpackbits(answers)[: len(tokens)].astype(np.bool_), starts)

    def save(self, file: Path) -> None:
        """Writes an .npz; ids take two bytes where they fit."""
        small = self.tokens.max(initial=0) < 1 << 16
        tokens = self.tokens.astype(np.uint16) if small else self.tokens
        fresh = file.with_suffix(".new")
        with fresh.open("wb") as stream:
            np.savez_compressed(stream, tokens=tokens, answers=np.packbits(self.answers), starts=self.starts)
        fresh.replace(file)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        at = slice(self.starts[index], self.starts[index + 1])
        return self.tokens[at], self.answers[at]

    @staticmethod
    def join(parts: Sequence[Samples]) -> Samples:
        """All samples of all parts."""
        ends = np.cumsum([0, *(len(part.tokens) for part in parts)])
        return Samples(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.answers for part in parts]),
            np.concatenate([[0], *(end + part.starts[1:] for end, part in zip(ends[:-1], parts, strict=True))]),
        )

    def take(self, indices: Sequence[int] | np.ndarray) -> Samples:
        """Some of the samples, in the given order."""
        return Samples.of([self[index] for index in indices])

    def cut(self, length: int) -> Samples:
        """The beginnings of all samples, of at most `length` tokens."""
        return Samples.of(
            [(tokens[:length], answers[:length]) for tokens, answers in map(self.__getitem__, range(len(self)))]
        )

    def split(self, count: int) -> tuple[Samples, Samples]:
        """The first `count` samples and the others."""
        return self.take(range(min(count, len(self)))), self.take(range(min(count, len(self)), len(self)))

    def batches(self, generator: np.random.Generator, batch_tokens: int, multiple: int = 1) -> Iterator[Batch]:
        """One epoch in random order: batches of `batch_tokens` tokens, padding included, and a multiple of rows.

        Samples of similar length go together; longer ones than the largest of LENGTHS are cut. What does not fill a
        batch is left for another epoch, unless it is all there is of that length.
        """
        lengths = np.diff(self.starts)
        bucket = np.minimum(np.searchsorted(LENGTHS, lengths), len(LENGTHS) - 1)
        groups = []
        for place, length in enumerate(LENGTHS):
            rows = max(1, batch_tokens // length // multiple) * multiple
            members = generator.permutation(np.flatnonzero(bucket == place))
            if 0 < len(members) < rows:
                members = np.resize(members, rows)
            groups += [(members[at : at + rows], length) for at in range(0, len(members) - rows + 1, rows)]
        for place in generator.permutation(len(groups)):
            yield self._batch(*groups[place])

    def _batch(self, members: np.ndarray, length: int) -> Batch:
        tokens, answers = np.zeros((len(members), length), np.int32), np.zeros((len(members), length), np.bool_)
        for row, index in enumerate(members):
            ids, is_answer = (values[:length] for values in self[index])
            tokens[row, : len(ids)], answers[row, : len(ids)] = ids, is_answer
        return Batch(tokens, answers)
