"""Cases of quantised_matmul."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import Seed
from pallas_kernels.quantised_matmul.weights import BLOCK, W4, W8


@dataclasses.dataclass(frozen=True)
class MatmulCase:
    """Arguments of a matmul: `rows` of `inputs` numbers, `outputs` numbers out; `weights` are w4, w8 or dense."""

    name: str
    rows: int
    inputs: int
    outputs: int
    weights: str = "w4"
    group_size: int = 32
    dtype: str = "bfloat16"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments; random words, every nibble and scale of its own."""
        generator = np.random.default_rng(seed)
        x = generator.standard_normal((self.rows, self.inputs), np.float32)
        if self.weights == "dense":
            values = generator.standard_normal((self.outputs, self.inputs), np.float32)
            return (jnp.asarray(x, self.dtype), jnp.asarray(values, self.dtype)), {}
        if self.weights == "w8":
            values = generator.integers(-127, 128, (self.outputs, self.inputs), dtype=np.int8)
            scales = generator.uniform(0.5, 1.5, self.outputs).astype(np.float32) / 2000
            return (jnp.asarray(x, self.dtype), W8(jnp.asarray(values), jnp.asarray(scales))), {}
        padded = -(-self.inputs // BLOCK) * BLOCK
        packed = generator.integers(-(2**15), 2**15, (padded // 4, self.outputs), dtype=np.int16)
        scales = generator.uniform(0.5, 1.5, (padded // self.group_size, self.outputs)).astype(np.float32) / 100
        weight = W4(jnp.asarray(packed), jnp.asarray(scales, jnp.float16), self.group_size)
        return (jnp.asarray(x, self.dtype), weight), {}

    @property
    def bytes(self) -> int:
        """The weight, which must be read once."""
        if self.weights == "dense":
            return self.inputs * self.outputs * jnp.dtype(self.dtype).itemsize
        if self.weights == "w8":
            return self.inputs * self.outputs
        return self.inputs * self.outputs // 2 + 2 * self.inputs * self.outputs // self.group_size

    @property
    def flops(self) -> int:
        """One product per weight and row."""
        return 2 * self.rows * self.inputs * self.outputs


SMALL_MATMUL = (
    MatmulCase("w4 by 32", 16, 256, 128),
    MatmulCase("w4 by 128", 16, 384, 256, group_size=128),
    MatmulCase("one row", 1, 256, 128),
    MatmulCase("twenty rows", 20, 256, 128),
    MatmulCase("padded inputs", 16, 200, 128),
    MatmulCase("odd outputs", 16, 256, 192),
    MatmulCase("w8", 16, 256, 128, weights="w8"),
    MatmulCase("w8, odd sizes", 5, 192, 160, weights="w8"),
    MatmulCase("dense", 16, 256, 128, weights="dense"),
    MatmulCase("dense, odd sizes", 5, 192, 160, weights="dense"),
    MatmulCase("dense, one block", 16, 32, 64, weights="dense"),
    MatmulCase("w4 by 32, many rows", 200, 256, 128),
    MatmulCase("w4 by 128, many rows, padded inputs", 70, 500, 256, group_size=128),
)
LARGE_MATMUL = (
    MatmulCase("Gemma 4 31B gate and up", 16, 5376, 43_008),
    MatmulCase("Gemma 4 31B down", 16, 21_504, 5376),
    MatmulCase("Gemma 4 31B local qkv", 16, 5376, 16_384),
    MatmulCase("Gemma 4 31B local o", 16, 8192, 5376),
    MatmulCase("Gemma 4 31B global qk", 16, 5376, 18_432),
    MatmulCase("Gemma 4 31B global o", 16, 16_384, 5376),
    MatmulCase("Gemma 4 31B head, w8", 16, 5376, 262_144, weights="w8"),
    MatmulCase("Gemma 4 31B gate and up, groups of 128", 16, 5376, 43_008, group_size=128),
    MatmulCase("Gemma 4 31B gate and up, 32 rows", 32, 5376, 43_008),
    MatmulCase("Gemma 4 26B-A4B gate and up", 16, 2816, 4224),
    MatmulCase("Gemma 4 26B-A4B down", 16, 2112, 2816),
    MatmulCase("Gemma 4 26B-A4B local qkv", 16, 2816, 8192),
    MatmulCase("Gemma 4 26B-A4B local o", 16, 4096, 2816),
    MatmulCase("Gemma 4 26B-A4B global qk", 16, 2816, 9216),
    MatmulCase("Gemma 4 26B-A4B global o", 16, 8192, 2816),
    MatmulCase("Gemma 4 26B-A4B drafter gate and up", 16, 2816, 11_264),
    MatmulCase("Gemma 4 26B-A4B drafter down", 16, 5632, 2816),
    MatmulCase("Gemma 4 26B-A4B drafter qkv", 16, 2816, 6144),
    MatmulCase("Qwen3-8B gate and up", 16, 4096, 24_576),
    MatmulCase("Qwen3-8B down", 16, 12_288, 4096),
    MatmulCase("Qwen3-8B qkv", 16, 4096, 6144),
    MatmulCase("Qwen3-8B o", 16, 4096, 4096),
    MatmulCase("SmolLM2 gate and up", 16, 576, 3072),
    MatmulCase("Qwen3-8B gate and up, w8", 16, 4096, 24_576, weights="w8"),
    MatmulCase("Gemma 4 31B drafter gate and up, dense", 16, 5376, 21_504, weights="dense"),
    MatmulCase("SmolLM2 head, dense", 16, 576, 49_152, weights="dense"),
    MatmulCase("SmolLM2 gate and up, dense", 16, 576, 3072, weights="dense"),
    MatmulCase("SmolLM2 qkv, dense", 16, 576, 960, weights="dense"),
    MatmulCase("SmolLM2 o, dense", 16, 576, 576, weights="dense"),
    MatmulCase("SmolLM2 down, dense", 16, 1536, 576, weights="dense"),
    MatmulCase("Gemma 4 31B gate and up, chunk", 1024, 5376, 43_008),
    MatmulCase("Gemma 4 31B gate and up, groups of 128, chunk", 1024, 5376, 43_008, group_size=128),
    MatmulCase("Gemma 4 31B down, chunk", 1024, 21_504, 5376),
    MatmulCase("Gemma 4 31B local qkv, chunk", 1024, 5376, 16_384),
    MatmulCase("Gemma 4 31B local o, chunk", 1024, 8192, 5376),
    MatmulCase("Gemma 4 31B gate and up, 128 rows", 128, 5376, 43_008),
    MatmulCase("Gemma 4 31B down, 128 rows", 128, 21_504, 5376),
    MatmulCase("Qwen3-8B gate and up, chunk", 1024, 4096, 24_576),
    MatmulCase("SmolLM2 gate and up, chunk", 1024, 576, 3072),
)
