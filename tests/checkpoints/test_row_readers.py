from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints.row_readers import SafetensorsReader
from checkpoints.source import RowReader


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(13, 5), (6, 4, 5)])
def test_rows_are_those_of_the_whole_tensor(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    save_file({"a": values, "b": values[:1]}, tmp_path / "x.safetensors")
    reader = SafetensorsReader(tmp_path / "x.safetensors", "a")
    assert isinstance(reader, RowReader)
    flat = values.reshape(-1, 5).astype(np.float32)
    np.testing.assert_array_equal(reader(), flat)
    for start, stop in ((0, 3), (3, 9), (5, 13), (0, 13), (4, 8), (12, 13)):
        part = reader.rows(start, stop)
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, flat[start:stop])


def test_a_norm_has_no_columns(tmp_path: Path) -> None:
    save_file({"a": np.arange(4, dtype=np.float32)}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(SafetensorsReader(tmp_path / "x.safetensors", "a")(), np.arange(4))
