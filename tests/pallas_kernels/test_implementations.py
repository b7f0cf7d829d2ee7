"""Which implementation runs where nobody names one, and what a wrong name gets."""

from __future__ import annotations

import jax
import pytest

from pallas_kernels.implementations import choose


@pytest.mark.parametrize(
    ("backend", "fits", "expected"),
    [("gpu", True, "triton"), ("gpu", False, "reference"), ("cpu", True, "reference")],
)
def test_triton_runs_on_gpus_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, backend: str, fits: bool, expected: str
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert choose("some", None, triton_fits=fits) == expected
    assert choose("some", "reference", triton_fits=fits) == "reference"
    assert choose("some", "triton", triton_fits=fits) == "triton"


@pytest.mark.parametrize("asked", ["cuda", ""])
def test_a_name_that_is_not_known_is_refused(asked: str) -> None:
    with pytest.raises(
        NotImplementedError, match=r"some has no implementation '.*': use one of \('reference', 'mosaic'\)"
    ):
        choose("some", asked, triton_fits=True, known=("reference", "mosaic"))
