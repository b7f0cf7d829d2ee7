"""What CPUs run is compiled as users' programs are, interpreted kernels are not."""

from __future__ import annotations

import pytest

ON_CPUS = ("reference", "int8_activations")


@pytest.fixture(autouse=True)
def _as_users_run(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("implementation") in ON_CPUS:
        request.getfixturevalue("optimised")
