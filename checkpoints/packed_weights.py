"""Quantised Hugging Face folders: GPTQ, AWQ and compressed-tensors, as readers of the f32 matrices they stand for.

Where a module `m` of a plain checkpoint has `m.weight` [out, in], these have (words are int32, lowest bits first):

    GPTQ                m.qweight [in/8, out]   m.scales [groups, out]   m.qzeros [groups, out/8]   m.g_idx [in]
    AWQ, "gemm"         m.qweight [in, out/8]   m.scales [groups, out]   m.qzeros [groups, out/8]
    compressed-tensors  m.weight_packed [out, in/8]   m.weight_scale [out, groups]   m.weight_shape [2]
      pack-quantized    m.weight_zero_point [out/8, groups] and m.weight_g_idx [in] where they are needed
      of all experts    m_packed [experts, out, in/8]   m_scale [experts, out, groups]   m_zero_point if need be
      int, float        m.weight [out, in] of int8 or 8-bit float   m.weight_scale [out, 1], [1] or a grid of blocks

A weight is (value - zero) * scale of its group. GPTQ's first version stores zero - 1. AWQ stores the eight columns of a
word in the order 0, 2, 4, 6, 1, 3, 5, 7. compressed-tensors stores signed values plus 8 (of 8 bits, 128).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.readers import Rows, flat_rows, flat_shape
from checkpoints.safetensors_file import FLOATS, StoredTensor

Stored = Mapping[str, StoredTensor]

_AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ the columns 0 to 7 are."""
_EIGHT_BITS = ("I8", "F8_E4M3", "F8_E5M2")
_COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_UNREAD = ("input_scale", "input_zero_point", "k_scale", "v_scale", "q_scale", "output_scale")
"""Ends of names of what compressed-tensors keeps for quantised activations and KV: ours are not quantised."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor as a plain checkpoint would hold it: `read` gives f32 rows of the flat shape."""

    origin: str
    shape: tuple[int, ...]
    read: Rows


def unpack(path: Path, stored: Stored, quantisation: Any) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors by the names of a plain checkpoint, and names of those that only quantised activations need.

    `quantisation` is the `quantization_config` of config.json, None without one. Raises CheckpointError for a method
    or variant that is not supported, and for parts that do not fit together.
    """
    if not quantisation:
        return {name: _plain(name, tensor) for name, tensor in stored.items()}, []
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if not isinstance(method, str) or method not in _METHODS:
        raise CheckpointError(
            f"{path}: quantisation method {method!r} is not supported; supported: {', '.join(_METHODS)}, and GGUF files"
        )
    suffix, check, build = _METHODS[method]
    check(path, quantisation)
    tensors, used, skipped = {}, set(), []
    for name in stored:
        module, _, last = name.rpartition(".")
        if method == "compressed-tensors" and last in _UNREAD:
            skipped.append(name)
        elif last == suffix:
            tensors[f"{module}.weight"] = build(_Parts(path, f"{module}.", stored, used), quantisation)
        elif method == "compressed-tensors" and last.endswith("_proj_packed"):
            start = name.removesuffix("packed")
            tensors[start.removesuffix("_")] = _packed_experts(_Parts(path, start, stored, used), quantisation)
        elif last == "weight" and stored[name].dtype in _EIGHT_BITS:
            tensors[name] = _eight_bits(_Parts(path, f"{module}.", stored, used), quantisation)
    rest = set(stored) - used - set(skipped)
    tensors |= {name: _plain(name, stored[name]) for name in stored if name in rest}
    return tensors, skipped


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The tensors of one module, whose names begin with `start`."""

    path: Path
    start: str
    stored: Stored
    used: set[str]

    def get(self, last: str) -> StoredTensor | None:
        name = self.start + last
        if name not in self.stored:
            return None
        self.used.add(name)
        return self.stored[name]

    def need(self, last: str, dimensions: int) -> StoredTensor:
        found = self.get(last)
        if found is None or len(found.shape) != dimensions:
            shape = "missing" if found is None else f"of shape {list(found.shape)}"
            raise self.error(f"tensor {self.start}{last} is {shape}")
        return found

    def fit(self, tensor: StoredTensor, *shape: int) -> None:
        if tensor.shape != shape:
            raise self.error(f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}")

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {reason}; config and weights do not belong together: fetch them again")


def _plain(name: str, tensor: StoredTensor) -> Tensor:
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{tensor.file}: tensor {name} has dtype {tensor.dtype}; supported: {', '.join(FLOATS)}, "
            "and quantised ones that quantization_config in config.json describes"
        )
    return Tensor(name, flat_shape(tensor.shape), flat_rows(tensor.rows, tensor.shape))


def _gptq(parts: _Parts, quantisation: Mapping[str, Any]) -> Tensor:
    bits, first_version = int(quantisation["bits"]), quantisation.get("checkpoint_format", "gptq") == "gptq"
    words, scales, zeros = (parts.need(name, 2) for name in ("qweight", "scales", "qzeros"))
    per_word = 32 // bits
    rows, columns, groups = words.shape[1], words.shape[0] * per_word, scales.shape[0]
    parts.fit(scales, groups, rows)
    parts.fit(zeros, groups, -(-rows // per_word))
    group_of = _group_of(parts, parts.get("g_idx"), columns, groups, int(quantisation.get("group_size") or -1))

    def read(start: int, stop: int) -> np.ndarray:
        values = _unpack_words(words.read()[:, start:stop].T, bits)
        zero = _unpack_words(zeros.read(), bits)[:, start:stop].T.astype(np.float32) + np.float32(first_version)
        return _dequantise(values, scales.rows(0, groups)[:, start:stop].T, zero, group_of)

    return Tensor(words.name, (rows, columns), read)


def _awq(parts: _Parts, quantisation: Mapping[str, Any]) -> Tensor:
    words, scales, zeros = (parts.need(name, 2) for name in ("qweight", "scales", "qzeros"))
    rows, columns, groups = words.shape[1] * 8, words.shape[0], scales.shape[0]
    parts.fit(scales, groups, rows)
    parts.fit(zeros, groups, words.shape[1])
    group_of = _group_of(parts, None, columns, groups, int(quantisation.get("group_size") or -1))

    def unpack(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        first = start // 8
        values = _unpack_words(tensor.read()[:, first : -(-stop // 8)], 4)
        ordered = values.reshape(len(values), -1, 8)[:, :, list(_AWQ_PLACE)].reshape(values.shape)
        return ordered[:, start - first * 8 : stop - first * 8].T

    def read(start: int, stop: int) -> np.ndarray:
        zero = unpack(zeros, start, stop).astype(np.float32)
        return _dequantise(unpack(words, start, stop), scales.rows(0, groups)[:, start:stop].T, zero, group_of)

    return Tensor(words.name, (rows, columns), read)


def _pack_quantized(parts: _Parts, quantisation: Mapping[str, Any]) -> Tensor:
    del quantisation  # what is stored says it
    words, scales, size = parts.need("weight_packed", 2), parts.need("weight_scale", 2), parts.need("weight_shape", 1)
    parts.fit(size, 2)
    rows, columns = (int(number) for number in size.read())
    bits = next((bits for bits in (4, 8) if words.shape == (rows, -(-columns * bits // 32))), 0)
    if not bits or rows < 1 or columns < 1:
        raise parts.error(f"tensor {words.name} has shape {list(words.shape)}, which is not {rows} x {columns} packed")
    groups, zeros = scales.shape[1], parts.get("weight_zero_point")
    parts.fit(scales, rows, groups)
    if zeros is not None:
        parts.fit(zeros, -(-rows * bits // 32), groups)
    group_of = _group_of(parts, parts.get("weight_g_idx"), columns, groups, -1)
    return Tensor(words.name, (rows, columns), _packed_rows(words, scales, zeros, bits, group_of))


def _packed_experts(parts: _Parts, quantisation: Mapping[str, Any]) -> Tensor:
    """The matrices of all experts, which were one tensor before they were packed."""
    words, scales, zeros = parts.need("packed", 3), parts.need("scale", 3), parts.get("zero_point")
    parts.get("shape")  # says nothing more
    bits = _bits(parts.path, quantisation)
    experts, height, columns = *words.shape[:2], words.shape[2] * 32 // bits
    groups = scales.shape[2]
    parts.fit(scales, experts, height, groups)
    if zeros is not None:
        parts.fit(zeros, experts, height * bits // 32, groups)
    group_of = _group_of(parts, None, columns, groups, -1)
    flat_zeros = _flat(zeros) if zeros else None
    read = _packed_rows(_flat(words), _flat(scales), flat_zeros, bits, group_of)
    return Tensor(words.name, (experts * height, columns), read)


def _flat(stored: StoredTensor) -> StoredTensor:
    """The matrices of experts below each other, which is how they lie in the file."""
    return dataclasses.replace(stored, shape=flat_shape(stored.shape))


def _packed_rows(
    words: StoredTensor, scales: StoredTensor, zeros: StoredTensor | None, bits: int, group_of: np.ndarray
) -> Rows:
    """Reads rows of compressed-tensors' packed words; all stored tensors have two dimensions."""
    middle, columns = np.float32(1 << (bits - 1)), len(group_of)

    def read(start: int, stop: int) -> np.ndarray:
        zero: Any = middle  # both are stored with it added
        if zeros is not None:
            zero = _unpack_words(zeros.read().T, bits).T[start:stop].astype(np.float32)
        values = _unpack_words(words.read(start, stop), bits)[:, :columns]
        return _dequantise(values, scales.rows(start, stop), zero, group_of)

    return read


def _bits(path: Path, quantisation: Mapping[str, Any]) -> int:
    groups = (quantisation.get("config_groups") or {}).values()
    found = {int((group.get("weights") or {}).get("num_bits") or 4) for group in groups} or {4}
    if found not in ({4}, {8}):
        raise CheckpointError(
            f"{path}: compressed-tensors with {sorted(found)} bits is not supported; supported: 4 or 8"
        )
    return found.pop()


def _eight_bits(parts: _Parts, quantisation: Mapping[str, Any]) -> Tensor:
    weight, scales, zeros = parts.need("weight", 2), parts.get("weight_scale"), parts.get("weight_zero_point")
    rows, columns = weight.shape
    if scales is None:
        raise parts.error(f"tensor {parts.start}weight_scale is missing")
    if scales.shape in ((), (1,), (1, 1)):
        grid, height, width = (1, 1), rows, columns
    elif scales.shape in ((rows,), (rows, 1)):
        grid, height, width = (rows, 1), 1, columns
    else:
        height, width = _block_structure(quantisation)
        grid = (-(-rows // height), -(-columns // width))
        parts.fit(scales, *grid)
    if zeros is not None:
        parts.fit(zeros, *scales.shape)

    def spread(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        blocks = np.asarray(tensor.read()).astype(np.float32).reshape(grid)[np.arange(start, stop) // height]
        return blocks if grid[1] == 1 else np.repeat(blocks, width, axis=1)[:, :columns]

    def read(start: int, stop: int) -> np.ndarray:
        values = weight.rows(start, stop)
        if zeros is not None:
            values -= spread(zeros, start, stop)
        values *= spread(scales, start, stop)
        return values

    return Tensor(weight.name, (rows, columns), read)


def _block_structure(quantisation: Mapping[str, Any]) -> tuple[int, int]:
    for group in (quantisation.get("config_groups") or {}).values():
        if blocks := group["weights"].get("block_structure"):
            height, width = blocks
            return max(1, int(height)), max(1, int(width))
    return 128, 128


def _unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """`[rows, words]` int32 to `[rows, words * 32 / bits]` uint8, lowest bits first."""
    content = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return content
    values = np.empty((len(content), 2 * content.shape[1]), np.uint8)
    values[:, 0::2], values[:, 1::2] = content & 15, content >> 4
    return values


def _group_of(parts: _Parts, index: StoredTensor | None, columns: int, groups: int, group_size: int) -> np.ndarray:
    """The group of every column: listed (act-order), or runs of one size."""
    if index is not None and index.shape == (columns,):
        found = np.asarray(index.read()).astype(np.int64)
        if found.min() < -1 or found.max() >= groups:
            raise parts.error(f"tensor {index.name} names group {found.max()} of {groups}")
        if found.min() >= 0:  # compressed-tensors fills an index that is not used with -1
            return found
    size = group_size if group_size > 0 else -(-columns // max(groups, 1))
    if -(-columns // size) != groups:
        raise parts.error(f"module {parts.start[:-1]} has {groups} groups for {columns} inputs in groups of {size}")
    return _runs(columns, size)


@functools.lru_cache(maxsize=64)
def _runs(columns: int, size: int) -> np.ndarray:
    """One array for all modules of a shape: experts are thousands."""
    return np.arange(columns) // size


def _dequantise(values: np.ndarray, scales: np.ndarray, zeros: Any, group_of: np.ndarray) -> np.ndarray:
    """(value - zero) * scale, f32 [rows, columns]; scales and zeros [rows, groups]."""
    result = values.astype(np.float32)
    zeros = np.broadcast_to(zeros, scales.shape)
    for group in range(scales.shape[1]):
        # A run of columns is a view, which numpy works on in place; a list of them is copied.
        columns: Any = np.flatnonzero(group_of == group)
        if len(columns) and columns[-1] - columns[0] + 1 == len(columns):
            columns = slice(columns[0], columns[-1] + 1)
        result[:, columns] -= zeros[:, group : group + 1]
        result[:, columns] *= scales[:, group : group + 1]
    return result


def _check_gptq(path: Path, quantisation: Mapping[str, Any]) -> None:
    bits, layout = quantisation.get("bits"), quantisation.get("checkpoint_format", "gptq")
    if bits not in (4, 8):
        raise CheckpointError(f"{path}: GPTQ with {bits!r} bits is not supported; supported: 4, 8")
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{path}: GPTQ's format {layout!r} is not supported; supported: gptq, gptq_v2")


def _check_awq(path: Path, quantisation: Mapping[str, Any]) -> None:
    bits, version = quantisation.get("bits", 4), str(quantisation.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise CheckpointError(f"{path}: AWQ {version!r} with {bits!r} bits is not supported; supported: gemm with 4")


def _check_compressed(path: Path, quantisation: Mapping[str, Any]) -> None:
    groups = quantisation.get("config_groups") or {}
    formats = [group.get("format") for group in groups.values() if isinstance(group, dict)]
    sparse = (quantisation.get("sparsity_config") or {}).get("format")
    formats = [each for each in [quantisation.get("format"), sparse, *formats] if each and each != "mixed-precision"]
    unknown = [each for each in formats if each not in _COMPRESSED]
    if unknown:
        known = ", ".join(_COMPRESSED[:-1])
        raise CheckpointError(f"{path}: compressed-tensors' format {unknown[0]!r} is not supported; supported: {known}")


_Build = Callable[[_Parts, Mapping[str, Any]], Tensor]
_METHODS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any]], None], _Build]] = {
    "gptq": ("qweight", _check_gptq, _gptq),
    "awq": ("qweight", _check_awq, _awq),
    "compressed-tensors": ("weight_packed", _check_compressed, _pack_quantized),
}
