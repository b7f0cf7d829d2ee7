"""Compiles every kernel case for an H100, on a machine that has none.

    pip install "jax[cuda12]"   # or cuda13, of the version of jax that is there
    python tools/compile_for_gpu.py [--operation NAME] [--case NAME] [--measured] [--hlo FOLDER]

All of XLA, Triton and ptxas runs, so this finds what lowering does not: more shared memory than the card has,
instructions that ptxas refuses, registers that spill. Nothing is executed. Prints a line per program and exits with
status 1 if one does not compile.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from pallas_kernels.operations import OPERATIONS, Program, programs

_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
_COMPILERS = ("nvidia.cuda_nvcc", "nvidia.cu13")
_THREADS = 2
_REFUSE_SPILLS = "xla_gpu_fail_ptx_compilation_on_register_spilling"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operation", choices=[each.name for each in OPERATIONS])
    parser.add_argument("--case", help="the cases of this name only")
    parser.add_argument("--measured", action="store_true", help="everything that a measurement compiles")
    parser.add_argument("--hlo", type=Path, metavar="FOLDER", help="write each program as XLA optimised it")
    arguments = parser.parse_args()
    need_compiler()
    todo = [
        (f"{operation.name}, {case.name}: {name}, {kernel}", program)
        for operation in OPERATIONS
        for case in (*operation.small, *operation.large)
        if arguments.operation in (None, operation.name) and arguments.case in (None, case.name)
        for kernel in operation.kernels(case)
        for name, program in programs(operation, case, kernel, copies=4).items()
        if arguments.measured or name == "kernel"
    ]
    if not todo:
        sys.exit(f"There is no case {arguments.case!r}.")
    device = h100()
    # Kernels look their tuned tiles up by the first device of jax.
    with mock.patch.object(jax, "devices", lambda: [device]), ThreadPoolExecutor(_THREADS) as pool:
        done = pool.map(functools.partial(_compile, device=device, folder=arguments.hlo), todo)
        failed = 0
        for (name, _), (report, ok) in zip(todo, done, strict=True):
            print(f"{name}: {report}", flush=True)
            failed += not ok
    print(f"{failed} of {len(todo)} programs do not compile")
    sys.exit(1 if failed else 0)


def need_compiler() -> None:
    """Ends the program if XLA cannot compile for cards here; else JAX computes on the host from now on."""
    if not (_installed(_PLUGINS) and _installed(_COMPILERS)):
        sys.exit(f'There is no compiler for NVIDIA cards here: pip install "jax[cuda12]=={jax.__version__}"')
    jax.config.update("jax_platforms", "cpu")  # or the plug-in asks for a driver


def h100() -> jax.Device:
    """One to compile for."""
    target = Path(__file__).with_name("h100.txtpb").read_text()
    return topologies.get_topology_desc("", platform="cuda", topology="1x1x1", target_config=target).devices[0]


def abstract_mesh(device: jax.Device) -> AbstractMesh:
    """What tells kernels that are lowered within it which device they are for."""
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=device.core_count, platform="gpu")
    return AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=kind)


def on_device(value: Any, device: jax.Device) -> jax.ShapeDtypeStruct:
    """The shape of an array that lies on the device."""
    sharding = NamedSharding(Mesh([device], ("device",)), PartitionSpec())
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


def _installed(modules: tuple[str, ...]) -> bool:
    """Whether one of these is there. A name is looked up only if its package exists, or find_spec raises."""
    find = importlib.util.find_spec
    return any(find(name.split(".")[0]) and find(name) for name in modules)


def _compile(named: tuple[str, Program], *, device: jax.Device, folder: Path | None) -> tuple[str, bool]:
    """What to say about a program, and whether it compiles."""
    name, program = named
    specs = jax.tree.map(functools.partial(on_device, device=device), program.specs)
    started = time.perf_counter()
    try:
        with use_abstract_mesh(abstract_mesh(device)):
            lowered = program.trace(specs).lower(lowering_platforms=("cuda",))
        try:
            compiled, remark = lowered.compile({_REFUSE_SPILLS: True}), ""
        except jax.errors.JaxRuntimeError as error:
            if "register spilling" not in str(error):
                raise
            compiled, remark = lowered.compile(), ", registers spill"
    except Exception as error:  # whatever stage refuses a program, the others are still to be tried
        return f"{type(error).__name__}: {error}"[:300], False
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.hlo").write_text(compiled.as_text())
    return f"ok, {time.perf_counter() - started:.1f} s{remark}", True


if __name__ == "__main__":
    main()
