"""The table of operations."""

from __future__ import annotations

import jax
import pytest

from pallas_kernels.operations import OPERATIONS, Operation, shapes


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_shapes_are_those_of_the_arguments(operation: Operation) -> None:
    for case in operation.small:
        positional, keywords = case.arguments()
        expected = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), positional)
        assert shapes(case) == (expected, keywords)
