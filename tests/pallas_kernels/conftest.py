"""What CPUs run is compiled as users' programs are, interpreted kernels are not."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from pallas_kernels.quantised_matmul import mosaic

ON_CPUS = ("reference", "int8_activations")


@pytest.fixture(autouse=True)
def _as_users_run(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("implementation") in ON_CPUS:
        request.getfixturevalue("optimised")


@pytest.fixture
def four_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So few that a program of the matmul for chunks has several tiles of a small one."""
    monkeypatch.setattr(mosaic, "most_programs", lambda: 4)
    jax.clear_caches()
    yield
    jax.clear_caches()
