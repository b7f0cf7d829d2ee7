from __future__ import annotations

import dataclasses

import jax
import pytest

from checkpoints import fit
from checkpoints.formats import encode
from checkpoints.random_models import random_target
from dflash_jax.engine.profile import profile_for_device
from dflash_jax.models.decoder import empty_pools
from dflash_jax.models.parameters import target_parameters
from tests.tiny import DRAFTER, TARGET

LATE_READER = dataclasses.replace(TARGET.layers[0], kv_source=0)
SHARED = dataclasses.replace(TARGET, layers=(*TARGET.layers[:3], LATE_READER))


def test_bytes_are_those_of_arrays() -> None:
    table, parameters = target_parameters(TARGET), random_target(TARGET)
    fits = fit.what_fits(TARGET)
    for label, weights, group_size in (("f32", "f32", 32), ("w4 g128", "w4", 128)):
        encoded = [encode(name, table[name], value, weights, group_size) for name, value in parameters.items()]
        assert fits["device_bytes"][label] == sum(leaf.nbytes for leaf in jax.tree.leaves(encoded))


@pytest.mark.parametrize("config", [TARGET, SHARED])
def test_kv_bytes_are_those_of_pools(config) -> None:
    pools = jax.eval_shape(lambda: empty_pools(config, num_pages=1, page_size=16, dtype="float32"))
    expected = sum(leaf.size * 4 for leaf in jax.tree.leaves(pools)) // 16
    assert fit.what_fits(config)["kv_bytes_per_token"] == expected


SLIDING = dataclasses.replace(
    TARGET,
    layers=(*(dataclasses.replace(TARGET.layers[0], window=1024),) * 3, TARGET.layers[0]),
    context_length=131_072,
)


@pytest.mark.parametrize("backend", ["gpu", "cpu"])
def test_layers_with_a_window_cost_a_sequence_what_their_rings_hold(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    profile = profile_for_device()
    ring = profile.ring(SLIDING, 1024)
    assert ring is not None
    sizes = {"num_pages": 1, "num_ring_pages": ring.most_held, "page_size": profile.page_size}
    pools = jax.eval_shape(lambda: empty_pools(SLIDING, **sizes, dtype=profile.dtype))
    expected = [sum(leaf.size * leaf.dtype.itemsize for leaf in pool) for pool in pools]
    fits = fit.what_fits(SLIDING)
    assert fits["kv_bytes_per_sequence"] == sum(expected[:3])
    assert fits["kv_bytes_per_token"] == expected[3] // profile.page_size

    weights, held = fits["device_bytes"]["bf16"], ring.most_held * profile.page_size
    per_token, sliding = fits["kv_bytes_per_token"], sum(expected[:3]) // held
    for tokens in (0, 7, held, held + 1, 100_000):
        memory = int((weights + per_token * tokens + sliding * min(tokens, held)) / 0.9) + 2
        monkeypatch.setattr(fit, "device_memory", lambda memory=memory: (memory, "memory of a device"))
        assert fit.what_fits(SLIDING)["longest_context"]["bf16"] == tokens


def test_the_longest_context(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = fit.what_fits(TARGET)
    weights, per_token = fits["device_bytes"], fits["kv_bytes_per_token"]
    assert set(fits["longest_context"].values()) == {TARGET.context_length}
    for tokens in (0, 1, 100):
        memory = int((weights["w8"] + tokens * per_token) / 0.9) + 2
        monkeypatch.setattr(fit, "device_memory", lambda memory=memory: (memory, "memory of a device"))
        found = fit.what_fits(TARGET)
        assert (found["longest_context"]["w8"], found["longest_context"]["f32"]) == (tokens, 0)
        assert (found["memory"], found["memory_bytes"]) == ("memory of a device", memory)


def test_memory_of_a_device_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        device_kind = "H100"

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 80}

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert fit.device_memory() == (80, "memory of H100")


def test_a_drafter() -> None:
    fits = fit.what_fits(DRAFTER)
    assert fits["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert "context_length" not in fits
