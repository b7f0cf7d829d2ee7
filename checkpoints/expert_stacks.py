"""Experts that a Hugging Face folder holds one by one, as the two tensors of all experts that transformers has.

Of Gemma 4 these are `experts.gate_up_proj` [experts, 2 * width, in], the rows of gate before those of up, and
`experts.down_proj` [experts, out, width]. Programs that quantise store linear maps instead, and write
`experts.N.gate_proj.weight`, `experts.N.up_proj.weight` and `experts.N.down_proj.weight` for every expert N.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.packed_weights import Tensor
from checkpoints.readers import Rows

_ONE = re.compile(r"(.*\blayers\.\d+\.)(?:moe\.)?experts\.(\d{1,5})\.(gate_up|gate|up|down)_proj\.weight")
_PARTS = {"gate_up_proj": (("gate_up",), ("gate", "up")), "down_proj": (("down",),)}
"""What an expert's rows of a tensor are made of, one way or the other."""


def stack_experts(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with those of single experts below each other. Nothing is read before rows are asked for.

    Raises CheckpointError for an expert that lacks a matrix or has one of another shape than the first.
    """
    layers: dict[str, dict[tuple[int, str], Tensor]] = defaultdict(dict)
    rest = {}
    for name, tensor in tensors.items():
        if found := _ONE.fullmatch(name):
            layers[found[1]][int(found[2]), found[3]] = tensor
        else:
            rest[name] = tensor
    for layer, experts in layers.items():
        for whole, ways in _PARTS.items():
            parts = next((way for way in ways if (0, way[0]) in experts), ways[-1])
            rest[f"{layer}experts.{whole}"] = _stack(path, f"{layer}experts", experts, parts)
    return rest


def _stack(path: Path, start: str, experts: Mapping[tuple[int, str], Tensor], parts: Sequence[str]) -> Tensor:
    matrices = []
    for number, part in itertools.product(range(1 + max(number for number, _ in experts)), parts):
        matrix = experts.get((number, part))
        if matrix is None:
            raise CheckpointError(f"{path}: tensor {start}.{number}.{part}_proj.weight is missing; fetch it again")
        matrices.append(matrix)
        if len(matrix.shape) != 2 or matrix.shape != matrices[0].shape:
            raise CheckpointError(
                f"{path}: tensor {matrix.origin} has shape {list(matrix.shape)}, {matrices[0].origin} "
                f"{list(matrices[0].shape)}; experts are all alike: fetch them again"
            )
    ends = list(itertools.accumulate(matrix.shape[0] for matrix in matrices))
    names = " and ".join(f"{part}_proj" for part in parts)
    return Tensor(f"{start}.N.{names}", (ends[-1], *matrices[0].shape[1:]), _rows(matrices, ends))


def _rows(matrices: Sequence[Tensor], ends: Sequence[int]) -> Rows:
    """Reads rows of matrices that stand below each other, where each of them ends."""

    def read(start: int, stop: int) -> np.ndarray:
        found = []
        for index in range(bisect.bisect_right(ends, start), len(ends)):
            first = ends[index] - matrices[index].shape[0]
            if first >= stop:
                break
            found.append(matrices[index].read(max(start - first, 0), min(stop, ends[index]) - first))
        return np.concatenate(found)

    return read
