"""Compiles every program of an engine for a big model, for an H100, on a machine that has none.

    pip install "jax[cuda12]"   # or cuda13, of the version of jax that is there
    python tools/compile_shape.py gemma4-31b [--context 131072] [--weights w8] [--layers 12]

Finds what compiling kernels alone (compile_for_gpu.py) does not: what whole programs need beside their arguments.
Nothing is executed, and no weight exists: arrays are shapes. Prints a line per program and exits with status 1 if one
does not compile.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax
import numpy as np
from compile_for_gpu import abstract_mesh, h100, need_compiler, on_device
from flax import nnx
from jax.sharding import use_abstract_mesh

from dflash_jax.bench import shapes
from dflash_jax.compress.score import Sparse
from dflash_jax.engine import programs as engine_programs

_SMALL = 1 << 20
"""Results of fewer bytes are ones, which the engine looks at; larger ones stay shapes."""
_jit = jax.jit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=shapes.TARGETS)
    parser.add_argument("--context", type=int, default=131_072)
    parser.add_argument("--weights", choices=["w4", "w8", "bf16"], default="w4")
    parser.add_argument("--layers", type=int, help="the first layers only")
    arguments = parser.parse_args()
    need_compiler()
    device = h100()
    failed = []
    with without_a_card(device, arguments.weights, arguments.layers, arguments.shape, failed):
        made, _ = shapes.random_programs(arguments.shape, arguments.context, sparse=Sparse())
        for label, action in made.warm_up_steps(with_scoring=True):
            print(f"{label}:", end=" ", flush=True)
            action()
            print(flush=True)
    sys.exit(1 if failed else 0)


@contextmanager
def without_a_card(
    device: jax.Device, weights: str, layers: int | None, shape: str, failed: list[str]
) -> Iterator[None]:
    """Here JAX takes the host for one with this device, and functions that are jitted are compiled instead of run."""

    def spec(value: Any) -> Any:
        return jax.tree.map(lambda leaf: on_device(np.asarray(leaf) if np.isscalar(leaf) else leaf, device), value)

    def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        jitted = _jit(function, **options)

        def call(*arguments: Any) -> Any:
            specs = spec(arguments)
            _compile(jitted, specs, device, failed)
            return jax.tree.map(_found, jax.eval_shape(jitted, *specs))

        return call

    def parameters(table: Any, _: str) -> Any:
        return jax.eval_shape(lambda: random_parameters(table, weights))

    def network(kind: Any) -> Callable[..., Any]:
        return lambda config, table, *, dtype: nnx.eval_shape(lambda given: kind(config, given, dtype=dtype), table)

    def shape_of(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **keywords: jax.eval_shape(lambda: function(*arguments, **keywords))

    random_parameters = shapes._parameters
    shortened = {**shapes.TARGETS[shape], **({"num_hidden_layers": layers} if layers else {})}
    drafter = shapes._DRAFTERS[shape]
    targets = tuple(target for target in drafter["targets"] if target < shortened["num_hidden_layers"])
    with ExitStack() as stack:
        patches = [
            mock.patch.object(jax, "default_backend", lambda: "gpu"),
            mock.patch.object(jax, "devices", lambda *_: [device]),
            mock.patch.object(jax, "jit", jit),
            mock.patch.object(shapes, "_parameters", parameters),
            *(mock.patch.object(shapes, name, network(getattr(shapes, name))) for name in ("Decoder", "Drafter")),
            mock.patch.object(engine_programs, "put", spec),
            mock.patch.object(engine_programs, "select", lambda *_: None),
            *(
                mock.patch.object(engine_programs, name, shape_of(getattr(engine_programs, name)))
                for name in ("empty_pools", "empty_drafter_pools", "empty_keys")
            ),
            mock.patch.dict(shapes.TARGETS, {shape: shortened}),
            mock.patch.dict(shapes._DRAFTERS, {shape: {**drafter, "targets": targets}}),
        ]
        for patch in patches:
            stack.enter_context(patch)
        yield


def _found(result: jax.ShapeDtypeStruct) -> Any:
    small = result.size * result.dtype.itemsize < _SMALL
    return np.ones(result.shape, result.dtype) if small else result


def _compile(jitted: Any, specs: Any, device: jax.Device, failed: list[str]) -> None:
    started = time.perf_counter()
    try:
        with use_abstract_mesh(abstract_mesh(device)):
            compiled = jitted.trace(*specs).lower(lowering_platforms=("cuda",)).compile()
    except Exception as error:  # whatever stage refuses a program, the others are still to be tried
        failed.append(str(error))
        print(f"{type(error).__name__}: {error}"[:300], end=" ")
        return
    memory = compiled.memory_analysis()
    arguments, temporary = (size / 1e9 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
    seconds = time.perf_counter() - started
    print(f"{temporary:.2f} GB beside {arguments:.1f} GB of arguments, {seconds:.0f} s", end=" ")


if __name__ == "__main__":
    main()
