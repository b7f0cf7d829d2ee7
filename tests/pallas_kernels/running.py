"""How tests run kernels and references: as one program, interpreted, or lowered for a card that is not there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels.tuning import Named

NEEDS_INTERPRETER = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic's interpreter of jax 0.10 knows no transposed slice"
)
NEEDS_TRANSPOSED_LOADS = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic of jax 0.10 loads nothing transposed"
)
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def one_program(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """A function as one program, of which keyword arguments are constants.

    Called as it stands, each of its small steps would be compiled by itself, which takes several times as long.
    """

    def call(*positional: Any, **keywords: Any) -> Any:
        return jax.jit(functools.partial(function, **fixed, **keywords))(*positional)

    return call


def each_case(cases: Sequence[Named]) -> pytest.MarkDecorator:
    """Runs a test with every case; of three, two are interpreted alike under every jax (pyproject.toml: slow)."""
    slow = [pytest.mark.slow]
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=case.name, marks=slow * (index % 3 > 0)) for index, case in enumerate(cases)]
    )


def tolerance(dtype: str) -> float:
    """How near results in a dtype must be to those in f64."""
    return 2e-2 if dtype == "bfloat16" else 2e-5


def lower(function: Any, arguments: tuple[Any, ...]) -> str:
    """A function as it is lowered for an H100."""
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=H100)
    with use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
