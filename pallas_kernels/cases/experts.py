"""Cases of grouped_matmul, expert_choice and expert_sum."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import Seed
from pallas_kernels.cases.layers import dtype_of_parts
from pallas_kernels.cases.matmul import MatmulCase


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """Arguments of grouped_matmul: rows that choose `active` of `groups` matrices each at random.

    Of the rows `deciding` choose, and the others repeat what these chose; 0 if all do. `gated` has gate and up in a
    matrix, with twice as many outputs as come out.
    """

    name: str
    rows: int
    active: int
    groups: int
    inputs: int
    outputs: int
    gated: bool = False
    deciding: int = 0
    weights: str = "w4"
    group_size: int = 32
    dtype: str = "bfloat16"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        activation = {"activation": _gelu} if self.gated else {}
        return (*self._matrices.arguments(seed)[0], jnp.asarray(self.chosen)), {"groups": self.groups, **activation}

    @property
    def chosen(self) -> np.ndarray:
        """Numbers of groups, the same for every seed: they decide what must be read."""
        generator = np.random.default_rng(self.rows)
        choices = [generator.permutation(self.groups)[: self.active] for _ in range(self.deciding or self.rows)]
        return np.resize(np.stack(choices), (self.rows, self.active)).astype(np.int32)

    @property
    def bytes(self) -> int:
        """The matrices that somebody chose."""
        return self._matrices.bytes // self.groups * len(np.unique(self.chosen))

    @property
    def flops(self) -> int:
        """One product per row and weight of a matrix that it chose."""
        return 2 * self.rows * self.active * self.inputs * self.outputs * (2 if self.gated else 1)

    @property
    def _matrices(self) -> MatmulCase:
        outputs = self.groups * self.outputs * (2 if self.gated else 1)
        return MatmulCase(self.name, self.rows, self.inputs, outputs, self.weights, self.group_size, self.dtype)


_gelu = functools.partial(jax.nn.gelu, approximate=True)


@dataclasses.dataclass(frozen=True)
class ExpertChoiceCase:
    """Arguments of choose_experts; with `alone`, all rows are treated as the last one."""

    name: str
    rows: int
    dim: int
    experts: int
    active: int
    alone: bool = False
    dtype: str = "float32"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        generator = np.random.default_rng(seed)
        x, router = (generator.standard_normal((rows, self.dim), np.float32) for rows in (self.rows, self.experts))
        router_scale, expert_scale, scale = (
            jnp.asarray(generator.uniform(0.5, 1.5, size), jnp.float32) for size in (self.dim, self.experts, self.dim)
        )
        source = jnp.full(self.rows, self.rows - 1, jnp.int32) if self.alone else None
        router_scale = router_scale * self.dim**-0.5
        positional = (jnp.asarray(x, self.dtype), jnp.asarray(router), router_scale, expert_scale, scale, source)
        return positional, {"active": self.active, "eps": 1e-6}

    @property
    def bytes(self) -> int:
        """The router and its scales; rows that must be read, and written with their norm."""
        rows = 2 * self.rows * self.dim * jnp.dtype(self.dtype).itemsize
        return 4 * (self.experts * (self.dim + 1) + 2 * self.dim) + rows

    @property
    def flops(self) -> int:
        """Scores."""
        return 2 * self.rows * self.experts * self.dim


@dataclasses.dataclass(frozen=True)
class ExpertSumCase:
    """Arguments of expert_sum; `spread` ones came back to places of a list, in which there are others."""

    name: str
    rows: int
    active: int
    dim: int
    parts: int
    spread: bool = False
    dtype: str = "float32"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments; one part is of the case's dtype, several are f32."""
        generator = np.random.default_rng(seed)
        choices = self.rows * self.active
        places = 2 * choices if self.spread else choices
        back = generator.standard_normal((places, self.dim), np.float32)
        place = jnp.asarray(generator.permutation(places)[:choices], jnp.int32) if self.spread else None
        parts = generator.standard_normal((self.parts, self.rows, self.dim), np.float32)
        weights = jnp.asarray(generator.uniform(0.05, 0.3, (self.rows, self.active)), jnp.float32)
        scales = [jnp.asarray(generator.uniform(0.5, 1.5, self.dim), jnp.float32) for _ in range(2)]
        parts = jnp.asarray(parts, dtype_of_parts(self.parts, self.dtype))
        return (jnp.asarray(back, self.dtype), place, weights, scales[0], parts, scales[1]), {"eps": 1e-6}

    @property
    def bytes(self) -> int:
        """What came back, the parts and the scales that must be read, and what must be written."""
        width, part_width = (jnp.dtype(each).itemsize for each in (self.dtype, dtype_of_parts(self.parts, self.dtype)))
        return self.rows * self.dim * ((self.active + 1) * width + self.parts * part_width) + 8 * self.dim

    @property
    def flops(self) -> int:
        """A product and a sum for each expert, one sum for each part, four operations for each norm."""
        return self.rows * self.dim * (2 * self.active + self.parts + 8)


SMALL_GROUPED = (
    GroupedCase("w4 by 32", 16, 4, 16, 256, 64),
    GroupedCase("gated", 16, 4, 16, 256, 64, gated=True),
    GroupedCase("gated, groups of 128", 5, 3, 8, 256, 32, gated=True, group_size=128),
    GroupedCase("padded inputs", 16, 2, 4, 200, 96),
    GroupedCase("one row", 1, 8, 128, 128, 32, gated=True),
    GroupedCase("one group for all", 64, 1, 8, 128, 64, deciding=1),
    GroupedCase("alike", 40, 3, 8, 128, 64, gated=True, deciding=1),
    GroupedCase("sorted", 130, 4, 64, 128, 32, gated=True),
    GroupedCase("sorted, many of a group", 300, 2, 4, 200, 64),
    GroupedCase("sorted, whole tiles", 520, 2, 4, 200, 128, group_size=128),
    GroupedCase("sorted, gated, whole tiles", 520, 2, 5, 256, 64, gated=True),
    GroupedCase("w8", 16, 4, 8, 192, 64, gated=True, weights="w8"),
    GroupedCase("dense", 16, 4, 8, 192, 64, gated=True, weights="dense"),
)
LARGE_GROUPED = (
    GroupedCase("Gemma 4 26B-A4B gate and up", 16, 8, 128, 2816, 704, gated=True),
    GroupedCase("Gemma 4 26B-A4B down", 128, 1, 128, 704, 2816),
    GroupedCase("Gemma 4 26B-A4B gate and up, plain step", 16, 8, 128, 2816, 704, gated=True, deciding=1),
    GroupedCase("Gemma 4 26B-A4B down, plain step", 128, 1, 128, 704, 2816, deciding=8),
    GroupedCase("Gemma 4 26B-A4B gate and up, four rows choose", 16, 8, 128, 2816, 704, gated=True, deciding=4),
    GroupedCase("Gemma 4 26B-A4B gate and up, groups of 128", 16, 8, 128, 2816, 704, gated=True, group_size=128),
    GroupedCase("Gemma 4 26B-A4B gate and up, 64 rows", 64, 8, 128, 2816, 704, gated=True),
    GroupedCase("Gemma 4 26B-A4B gate and up, chunk of 128", 128, 8, 128, 2816, 704, gated=True),
    GroupedCase("Gemma 4 26B-A4B down, chunk of 128", 1024, 1, 128, 704, 2816),
    GroupedCase("Gemma 4 26B-A4B gate and up, chunk", 1024, 8, 128, 2816, 704, gated=True),
    GroupedCase("Gemma 4 26B-A4B down, chunk", 8192, 1, 128, 704, 2816),
)
SMALL_EXPERT_CHOICE = (
    ExpertChoiceCase("one row", 1, 64, 16, 2),
    ExpertChoiceCase("three of 48", 20, 96, 48, 3),
    ExpertChoiceCase("bf16", 16, 256, 128, 8, dtype="bfloat16"),
    ExpertChoiceCase("alone", 16, 128, 32, 4, alone=True),
)
LARGE_EXPERT_CHOICE = (
    ExpertChoiceCase("Gemma 4 26B-A4B step", 16, 2816, 128, 8, dtype="bfloat16"),
    ExpertChoiceCase("Gemma 4 26B-A4B plain step", 16, 2816, 128, 8, alone=True, dtype="bfloat16"),
    ExpertChoiceCase("Gemma 4 26B-A4B chunk", 1024, 2816, 128, 8, dtype="bfloat16"),
)
SMALL_EXPERT_SUM = (
    ExpertSumCase("one row", 1, 2, 64, 1),
    ExpertSumCase("splits", 5, 3, 96, 4),
    ExpertSumCase("bf16", 16, 8, 352, 3, dtype="bfloat16"),
    ExpertSumCase("spread", 6, 3, 96, 2, spread=True),
)
LARGE_EXPERT_SUM = (
    ExpertSumCase("Gemma 4 26B-A4B step", 16, 8, 2816, 3, dtype="bfloat16"),
    ExpertSumCase("Gemma 4 26B-A4B chunk", 1024, 8, 2816, 1, spread=True, dtype="bfloat16"),
)
