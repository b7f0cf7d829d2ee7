"""Strictness that every test runs under, and the real model that some of them share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
GOLDENS = TESTS / "goldens"

# Tests compare numbers in f32 and must not depend on which accelerator a machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Commands that tests start inherit this, so that the default model is converted once for all runs in this folder.
os.environ.setdefault("DFLASH_JAX_CACHE", str(REPOSITORY / ".cache" / "dflash-jax"))
# Mosaic's interpreter blocks a thread of XLA's pool for each warpgroup that waits for another one, and one for all of
# them; the pool has as many threads as there are cores, and on two cores some tests would never end.
os.environ.setdefault("NPROC", str(max(4, os.cpu_count() or 1)))

import jax  # noqa: E402  (reads JAX_PLATFORMS when it is imported)
from jaxtyping import install_import_hook  # noqa: E402

# Shapes in the signatures of the networks are checked at every call; this has to come before anything imports them.
install_import_hook("dflash_jax.models", "beartype.beartype")

from dflash_jax.engine.compilation import enable_persistent_cache  # noqa: E402

# Tests build many engines and layers of the same few shapes: what one has compiled, others and later runs read. An
# engine that loads a model turns this on for itself; smaller programs are worth it too where there are thousands.
enable_persistent_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


UNOPTIMISED = "jax_disable_most_optimizations"
OPTIMISED = (
    "engine/test_engine.py",
    "engine/test_equality.py",
    "engine/test_sparse_scoring.py",
    "server",
    "train",
    "speculate/test_equality.py",
    "speculate/test_distribution.py",
    "speculate/test_tree_distribution.py",
)
"""Tests whose programs are compiled as users' are: whole answers, and long runs. What the others run takes LLVM longer
to optimise than to run; those of them that are about a CPU's bits ask for `optimised`."""


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module(request: pytest.FixtureRequest):
    """Compiled programs are memory maps, of which a process may have 65,530: each module starts without others'."""
    as_users_run = request.path.resolve().relative_to(TESTS).as_posix().startswith(OPTIMISED)
    jax.config.update(UNOPTIMISED, not as_users_run)
    yield
    jax.clear_caches()


@pytest.fixture
def optimised() -> Iterator[None]:
    """What this test compiles is optimised as users' programs are.

    jit does not ask for the option again: a function that another test has compiled stays as it is.
    """
    before = jax.config.read(UNOPTIMISED)
    jax.config.update(UNOPTIMISED, False)
    yield
    jax.config.update(UNOPTIMISED, before)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder with outputs of reference implementations; tools/make_goldens.py writes it."""
    return GOLDENS


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The converted default model, with real weights."""
    import checkpoints

    return checkpoints.default_model(lambda label, done, total: None)
