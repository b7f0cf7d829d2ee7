"""Every implementation of attention_rows on the same cases, against loops over rows and heads in f64 numpy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention_rows import api, triton
from pallas_kernels.cases.layers import LARGE_ATTENTION_ROWS, SMALL_ATTENTION_ROWS, AttentionRowsCase
from pallas_kernels.operations import shapes, written_rows
from tests.pallas_kernels.running import each_case, lower, one_program, tolerance

IMPLEMENTATIONS = {
    "reference": one_program(api.attention_rows, implementation="reference"),
    "triton": functools.partial(triton.attention_rows, interpret=True),
}
IN_BF16 = [case for case in SMALL_ATTENTION_ROWS if case.dtype == "bfloat16"]
LAYOUT = api.HeadLayout(4, 2, 32, 32)
CASE = AttentionRowsCase("parts and norms", (21, 5), 16, LAYOUT, 16, 3, parts=2, norms="qkv")


def run(
    implementation: str, parts: Any, query_scale: Any, key_scale: Any, *others: Any, **keywords: Any
) -> tuple[api.Heads, api.KvPool | None]:
    norms = api.HeadNorms(query_scale, key_scale, keywords.pop("norm_values"), keywords.pop("eps"))
    return IMPLEMENTATIONS[implementation](parts, *others, norms=norms, **keywords)


def kept(results: tuple[api.Heads, api.KvPool | None], page_size: int) -> list[np.ndarray]:
    """Queries, and the pools without page 0, which nobody reads."""
    queries, pool = results
    return [np.asarray(each, np.float64) for each in (queries, *(pages[page_size:] for pages in pool or ()))]


def in_f64(case: AttentionRowsCase) -> list[np.ndarray]:
    (parts, query_scale, key_scale, pool, table, starts, tables), keywords = case.arguments()
    layout, half, stored = case.layout, case.layout.head_dim // 2, case.layout.key_width // 2
    parts, (cos, sin) = np.asarray(parts, np.float64).sum(axis=0), (np.asarray(each, np.float64) for each in tables)
    turning = [*range(stored), *range(half, half + stored)]
    keys, values = (np.array(each, np.float64) for each in pool or (np.zeros((0, 0, 0)),) * 2)
    width = layout.head_dim + (2 * stored if layout.compact else 0)
    queries = np.zeros((*parts.shape[:2], layout.heads, width))

    def head(slot: int, row: int, number: int) -> np.ndarray:
        start = layout.column + number * layout.head_dim
        return parts[slot, row, start : start + layout.head_dim]

    def normed(x: np.ndarray, scale: Any) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + keywords["eps"]) * np.asarray(scale, np.float64)

    def turned(x: np.ndarray, slot: int, row: int) -> np.ndarray:
        """Numbers of a pair are a complex number; turning multiplies it with another one."""
        product = (x[:half] + 1j * x[half:]) * (cos + 1j * sin)[slot, row, 0]
        return np.concatenate([product.real, product.imag])

    for slot, row in np.ndindex(*parts.shape[:2]):
        for number in range(layout.heads):
            x = head(slot, row, number)
            x = turned(x if query_scale is None else normed(x, query_scale), slot, row)
            if layout.compact:
                standing = np.asarray(key_scale, np.float64)
                standing[turning] = 0
                x = np.concatenate([x[turning], x * standing])
            queries[slot, row, number] = x
        token = int(starts[slot]) + row
        page = token // case.page_size % (case.pages if case.ring else 10**9)
        if page >= case.pages:
            continue
        place = int(table[slot, page]) * case.page_size + token % case.page_size
        for number in range(layout.kv_heads):
            k = head(slot, row, layout.heads + number)
            v = k if layout.values_are_keys else head(slot, row, layout.heads + layout.kv_heads + number)
            k = turned(k if key_scale is None else normed(k, key_scale), slot, row)
            keys[place, number] = k[turning]
            values[place, number] = normed(v, 1.0) if keywords["norm_values"] else v
    return [queries, *([keys[case.page_size :], values[case.page_size :]] if layout.kv_heads else [])]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@each_case(SMALL_ATTENTION_ROWS)
def test_queries_and_pages_are_those_of_f64(case: AttentionRowsCase, implementation: str) -> None:
    positional, keywords = case.arguments()
    results = run(implementation, *positional, **keywords)
    assert all(each.dtype == case.dtype for each in jax.tree.leaves(results))
    for found, expected in zip(kept(results, case.page_size), in_f64(case), strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance(case.dtype), rtol=tolerance(case.dtype))


def test_rows_of_the_case_run_past_the_last_page() -> None:
    case = next(case for case in SMALL_ATTENTION_ROWS if case.name == "past the last page")
    before = np.asarray(case.arguments()[0][3][0])[case.page_size :]
    written = (before != in_f64(case)[1]).any(axis=(1, 2)).sum()
    assert written == (48 - 40) + 16


@each_case(IN_BF16)
def test_both_implementations_round_at_the_same_places(
    case: AttentionRowsCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference step by step: which roundings XLA leaves out of a program depends on how it fuses."""
    monkeypatch.setitem(IMPLEMENTATIONS, "reference", functools.partial(api.attention_rows, implementation="reference"))
    positional, keywords = case.arguments()
    results = (kept(run(name, *positional, **keywords), case.page_size) for name in IMPLEMENTATIONS)
    for reference, kernel in zip(*results, strict=True):
        np.testing.assert_array_equal(kernel, reference)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compact_queries_meet_keys_and_values_as_full_ones_meet_keys(implementation: str) -> None:
    """RoPE leaves the dims alone that the compact form does not store, and values there are keys without the scale."""
    compact = AttentionRowsCase("", (21,), 16, api.HeadLayout(4, 2, 64, 16, True), 16, 3, norms="qkv")
    positional, keywords = compact.arguments()
    parts, query_scale, key_scale, (_, value_pool), *others = positional
    full = {**keywords, "layout": dataclasses.replace(compact.layout, key_width=64)}
    few, pool = run(implementation, *positional, **keywords)
    whole, full_pool = run(implementation, parts, query_scale, key_scale, (value_pool, value_pool), *others, **full)
    assert pool is not None and full_pool is not None
    rows = slice(*(int(others[0][0, 1]) * 16 + offset for offset in (5, 16)))  # tokens 21 to 31
    for head in range(4):
        both = jnp.concatenate([pool[0][rows, head // 2], pool[1][rows, head // 2]], axis=-1)
        expected = full_pool[0][rows, head // 2] @ whole[0, :, head].T
        np.testing.assert_allclose(both @ few[0, :, head].T, expected, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_of_a_row_do_not_depend_on_its_neighbours(implementation: str, dtype: str) -> None:
    (parts, *others), keywords = dataclasses.replace(CASE, dtype=dtype).arguments()
    apply = jax.jit(functools.partial(run, implementation, **keywords))
    for before, after in zip(
        rows_of_slot_0(apply(parts, *others), others, 7),
        rows_of_slot_0(apply(parts.at[:, :, 7:].set(100.0).at[:, 1].set(-3.0), *others), others, 7),
        strict=True,
    ):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("implementation", "dtype"), [("reference", "float32"), ("triton", "float32"), ("triton", "bfloat16")]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(implementation: str, dtype: str, rows: int) -> None:
    """Not those of the reference in bf16: which roundings XLA leaves out depends on how it fuses."""
    case = dataclasses.replace(CASE, dtype=dtype, starts=CASE.starts[:1])
    (parts, query_scale, key_scale, pool, table, starts, tables), keywords = case.arguments()
    apply = jax.jit(functools.partial(run, implementation, **keywords))
    whole = kept(apply(parts, query_scale, key_scale, pool, table, starts, tables), case.page_size)
    for first in (0, 5, 16 - rows):
        some = slice(first, first + rows)
        others = (table, starts + first, tuple(each[:, some] for each in tables))
        queries, *pools = kept(apply(parts[:, :, some], query_scale, key_scale, pool, *others), case.page_size)
        np.testing.assert_array_equal(queries, whole[0][:, some])
        number, offset = np.divmod(np.arange(21 + first, 21 + first + rows), case.page_size)
        place = (np.asarray(table)[0, number] - 1) * case.page_size + offset
        for few, all_rows in zip(pools, whole[1:], strict=True):
            np.testing.assert_array_equal(few[place], all_rows[place])


def rows_of_slot_0(results: tuple[api.Heads, api.KvPool | None], others: list[Any], rows: int) -> Iterator[np.ndarray]:
    """Queries, keys and values of its first rows."""
    queries, pool = results
    table, starts = (np.asarray(each) for each in others[3:5])
    number, offset = np.divmod(np.arange(starts[0], starts[0] + rows), CASE.page_size)
    yield np.asarray(queries[0, :rows], np.float32)
    for pages in pool or ():
        yield np.asarray(pages, np.float32)[table[0, number] * CASE.page_size + offset]


@pytest.mark.parametrize("case", [*SMALL_ATTENTION_ROWS, *LARGE_ATTENTION_ROWS], ids=lambda case: case.name)
def test_lowers_for_cuda(case: AttentionRowsCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(written_rows, **keywords, implementation="triton"), positional)


def attend(case: AttentionRowsCase, *, implementation: str | None = None, **changed: Any) -> Any:
    """The public function on a case's arguments, some of them changed."""
    (parts, query_scale, key_scale, pool, table, starts, tables), keywords = case.arguments()
    norms = api.HeadNorms(query_scale, key_scale, keywords.pop("norm_values"), keywords.pop("eps"))
    arrays = {"parts": parts, "pool": pool, "page_table": table, "starts": starts, "tables": tables}
    return api.attention_rows(**{**arrays, "norms": norms, **keywords, **changed}, implementation=implementation)


def test_what_does_not_fit_is_named() -> None:
    parts, pool = CASE.arguments()[0][0], CASE.arguments()[0][3]
    with pytest.raises(ValueError, match="2 heads of keys and no pool"):
        attend(CASE, pool=None)
    with pytest.raises(ValueError, match="0 heads of keys and a pool"):
        attend(CASE, layout=dataclasses.replace(LAYOUT, kv_heads=0))
    with pytest.raises(ValueError, match=r"the projection has 255 columns, .* needs 256"):
        attend(CASE, parts=parts[..., 1:])
    with pytest.raises(ValueError, match=r"the pool has \(\(2, 31\), \(2, 32\)\) numbers"):
        attend(CASE, pool=(pool[0][..., 1:], pool[1]))
    with pytest.raises(ValueError, match="by the scale of their norm: give it"):
        attend(AttentionRowsCase("compact", (0,), 1, api.HeadLayout(1, 1, 32, 16, True), 16, 1, norms="q"))


def test_what_triton_cannot_take_is_named() -> None:
    with pytest.raises(NotImplementedError, match="'mosaic': use one of"):
        attend(CASE, implementation="mosaic")
    odd_head = AttentionRowsCase("odd head", (3,), 2, api.HeadLayout(2, 1, 24, 24), 16, 1)
    odd_page = AttentionRowsCase("odd page", (3,), 2, LAYOUT, 24, 1)
    small_head = AttentionRowsCase("small head", (3,), 2, api.HeadLayout(2, 1, 8, 8), 16, 1)
    for case, named in ((odd_head, "head_dim 24"), (odd_page, "page_size 24"), (small_head, "head_dim 8")):
        with pytest.raises(NotImplementedError, match=named):
            attend(case, implementation="triton")
        for found, expected in zip(kept(attend(case), case.page_size), in_f64(case), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_case_counts_what_is_read_written_and_computed() -> None:
    case = AttentionRowsCase("", (0, 3), 5, LAYOUT, 16, 1, parts=3, norms="qk", beside=7, dtype="bfloat16")
    assert case.bytes == 2 * 5 * (3 * 8 * 32 * 4 + 32 * 4 + 8 * 32 * 2)  # parts, angles, heads
    assert case.flops == 2 * 5 * 32 * (2 * 8 + 4 * 6 + 3 * 6)  # sums of all, norms and turns of queries and keys
    compact = AttentionRowsCase("", (0,), 1, api.HeadLayout(4, 2, 64, 16, True), 16, 1, norms="qkv")
    assert compact.bytes == 4 * (6 * 64 + 64 + 4 * (16 + 64) + 2 * (16 + 64))
