from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.formats import encode, stored_bytes
from checkpoints.groups import Group, f32_bytes, plan
from checkpoints.store import split
from dflash_jax.models.parameters import Parameter

MB = 1 << 20
TABLES = st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([1, 64, 5376])), min_size=1, max_size=20)


@given(TABLES, st.integers(1 * MB, 64 * MB))
@settings(max_examples=50, deadline=None)
def test_groups_hold_every_row_once_and_little_at_once(shapes: list[tuple[int, int]], piece_bytes: int) -> None:
    table = {f"layers.{index}.mlp.up": Parameter(shape, matrix=True) for index, shape in enumerate(shapes)}
    groups = plan(table, piece_bytes)
    rows = defaultdict(list)
    for group in groups:
        size = 0
        for piece in group.pieces:
            rows[piece.tensor] += range(piece.start, piece.stop)
            size += f32_bytes(table[piece.tensor]) * (piece.stop - piece.start) // piece.rows
        assert size <= piece_bytes
        assert len(group.pieces) == 1 or all(piece.whole for piece in group.pieces)
        assert Group.from_json(group.name, group.to_json()) == group
    assert list(rows) == list(table)
    assert all(rows[name] == list(range(parameter.shape[0])) for name, parameter in table.items())


def test_groups_of_a_31b_model() -> None:
    hidden, width, layers = 5376, 21504, 60
    table = {"embed": Parameter((262144, hidden), matrix=True)}
    for index in range(layers):
        table[f"layers.{index}.mlp_norm"] = Parameter((hidden,))
        table |= {f"layers.{index}.mlp.{name}": Parameter((width, hidden), matrix=True) for name in ("gate", "up")}
        table[f"layers.{index}.mlp.down"] = Parameter((hidden, width), matrix=True)
    groups = plan(table)
    assert [str(piece) for group in groups[:2] for piece in group.pieces] == [
        "embed rows 0-24960",
        "embed rows 24960-49920",
    ]
    assert all(piece.whole for group in groups for piece in group.pieces if piece.tensor != "embed")


@pytest.mark.parametrize(
    "parameter", [Parameter((48, 160), matrix=True), Parameter((48, 256), matrix=True), Parameter((160,))]
)
@pytest.mark.parametrize(("weights", "group_size"), [("f32", 32), ("bf16", 32), ("w8", 32), ("w4", 32), ("w4", 128)])
@pytest.mark.parametrize("name", ["embed", "layers.0.mlp.up"])
def test_stored_bytes_are_those_of_what_is_stored(
    name: str, parameter: Parameter, weights: str, group_size: int
) -> None:
    values = np.ones(parameter.shape, np.float32)
    parts = split(encode(name, parameter, values, weights, group_size))
    assert stored_bytes(name, parameter, weights, group_size) == sum(part.nbytes for part in parts.values())
