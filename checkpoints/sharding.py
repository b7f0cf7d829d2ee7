"""Where the parts of a parameter go: to one device, to every device of a mesh, or in slices along its axis "tensor"."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

AXIS = "tensor"

Spec = Callable[[str, str], PartitionSpec]
"""The slices of one part of a parameter, by the parameter's name and the part's.

A part is `weight` of what is dense, `values` or `row_scales` of w8, `packed` or `group_scales` of w4.
"""

_BY_OUTPUTS = (*(f"attention.{name}" for name in ("q", "k", "v", "q_bias", "k_bias", "v_bias")), "mlp.gate", "mlp.up")
_BY_INPUTS = ("attention.o", "mlp.down")
_AXES = {"weight": (0, 1), "values": (0, 1), "row_scales": (0, None), "packed": (1, 0), "group_scales": (1, 0)}
"""Axes of outputs and inputs of each part."""


def replicated(name: str, part: str) -> PartitionSpec:
    """Everything on every device."""
    del name, part
    return PartitionSpec()


def tensor_parallel(name: str, part: str) -> PartitionSpec:
    """Outputs of q, k, v, gate, up and the head in slices, inputs of o and down; the rest on every device.

    XLA inserts the sums over devices that this takes. What a decoder concatenates (q, k and v; gate and up) keeps an
    even slicing of the whole, which is not one by heads; XLA moves what it must, and results stay the same.
    """
    outputs, inputs = _AXES[part]
    by_outputs = name == "lm_head" or name.endswith(_BY_OUTPUTS)
    axis = outputs if by_outputs else inputs if name.endswith(_BY_INPUTS) else None
    return PartitionSpec() if axis is None else PartitionSpec(*([None] * axis), AXIS)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices for the parts of parameters; without a mesh, the default device."""

    mesh: Mesh | None = None
    spec: Spec = replicated

    def sharding(self, name: str, part: str, shape: Sequence[int]) -> Sharding:
        """Where a part of this shape goes; an axis that a mesh cannot divide is not cut."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        wanted = zip(self.spec(name, part), shape, strict=False)  # axes that are not named are not cut
        cuts = [axis if axis is None or size % self._devices(axis) == 0 else None for axis, size in wanted]
        return NamedSharding(self.mesh, PartitionSpec(*cuts))

    def uncut(self) -> Sharding:
        """The whole of an array on every device."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, PartitionSpec())

    def _devices(self, axis: str | tuple[str, ...]) -> int:
        assert self.mesh is not None
        total = 1
        for name in (axis,) if isinstance(axis, str) else axis:
            total *= self.mesh.shape[name]
        return total
