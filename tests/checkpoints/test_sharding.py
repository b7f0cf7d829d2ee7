"""Weights on a mesh: slices reach their devices, and tensor-parallel logits equal those of one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec

from checkpoints.sharding import tensor_parallel

# Four devices exist only in a process that asks for them before jax starts.
COMPARE = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import checkpoints
from checkpoints import conversion, groups
from dflash_jax.engine.target import Target
from dflash_jax.models.decoder import Decoder

plan = groups.plan
conversion.plan = lambda table, piece_bytes=8000: plan(table, piece_bytes)  # the embedding comes in pieces
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("tensor",))
source, out = Path(sys.argv[1]), Path(sys.argv[2])

def logits(loaded, ids):
    decoder = Decoder(loaded.config, loaded.parameters, dtype=jnp.float32)
    return np.asarray(Target(decoder).logits(ids)), decoder

for weights in sys.argv[3:]:
    checkpoints.convert(source, out, weights=weights)
    single, sharded = checkpoints.load(out), checkpoints.load(out, mesh=mesh)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, single.config.vocab_size, (2, 24)))
    expected, _ = logits(single, ids)
    found, decoder = logits(sharded, ids)
    for one, many in zip(jax.tree.leaves(single.parameters), jax.tree.leaves(sharded.parameters), strict=True):
        assert np.array_equal(one, many)
        assert len(many.sharding.device_set) == 4
    down = jax.tree.leaves(sharded.parameters["layers.0.mlp.down"])[0]
    direct = checkpoints.load(source, weights=weights, mesh=mesh)
    for one, other in zip(jax.tree.leaves(direct.parameters), jax.tree.leaves(sharded.parameters), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    print(json.dumps({
        "weights": weights,
        "error": float(np.abs(found - expected).max()),
        "size": float(np.abs(expected).max()),
        "same": bool((found.argmax(-1) == expected.argmax(-1)).all()),
        "down": [down.shape, down.addressable_shards[0].data.shape],
        "qkv": str(jax.tree.leaves(decoder.layers[0].attention.qkv.weight.get_value())[0].sharding.spec),
        "gate_up": str(jax.tree.leaves(decoder.layers[0].feed_forward.mlp.gate_up.weight.get_value())[0].sharding.spec),
    }))
"""


def compare(source: Path, out: Path, formats: list[str]) -> list[dict]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, str(source), str(out), *formats],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("model", "formats"),
    [("qwen3", ["f32", "w8", "w4"]), pytest.param("gemma4_experts", ["f32"], marks=pytest.mark.slow)],
)
def test_tensor_parallel_logits_equal_those_of_one_device(
    goldens: Path, tmp_path: Path, model: str, formats: list[str]
) -> None:
    rows = compare(goldens / model, tmp_path / "out", formats)
    assert [row["weights"] for row in rows] == formats
    for row in rows:
        assert row["error"] < 5e-5 * max(1, row["size"]), row  # sums over devices come in another order
        assert row["same"]
        whole, slice_ = row["down"]
        axis = 0 if row["weights"] == "w4" else 1  # inputs
        assert slice_[axis] * 4 == whole[axis] and slice_[1 - axis] == whole[1 - axis]


@pytest.mark.parametrize(
    ("name", "part", "expected"),
    [
        ("layers.3.attention.q", "weight", ("tensor",)),
        ("layers.3.attention.q_bias", "weight", ("tensor",)),
        ("layers.3.mlp.up", "values", ("tensor",)),
        ("layers.3.mlp.up", "row_scales", ("tensor",)),
        ("layers.3.mlp.up", "packed", (None, "tensor")),
        ("layers.3.mlp.up", "group_scales", (None, "tensor")),
        ("layers.3.attention.o", "weight", (None, "tensor")),
        ("layers.3.mlp.down", "row_scales", ()),
        ("layers.3.mlp.down", "packed", ("tensor",)),
        ("lm_head", "weight", ("tensor",)),
        ("embed", "weight", ()),
        ("layers.3.attention.q_norm", "weight", ()),
        ("layers.3.experts.down", "weight", ()),
        ("layers.3.per_layer.gate", "weight", ()),
    ],
)
def test_slices(name: str, part: str, expected: tuple) -> None:
    assert tensor_parallel(name, part) == PartitionSpec(*expected)
