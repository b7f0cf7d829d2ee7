"""Engines whose layers with a window keep only what a later row sees, against engines that keep everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dflash_jax.engine.engine import Engine
from dflash_jax.engine.loading import Model
from dflash_jax.engine.profile import Profile
from dflash_jax.models.config import ModelConfig, RopeConfig
from tests.tiny import TARGET, tiny_drafter, tiny_model, tiny_target

CONTEXT = 2048
LONG = "".join(f"Line {n} of the document says {n * 7919 % 1000}.\n" for n in range(12))
QUESTION = {"role": "user", "content": "Say something."}


def windowed(config: ModelConfig = TARGET) -> ModelConfig:
    """As in Gemma 4: layers have small windows but for one, whose K and V are the same but for norm and RoPE."""
    windows = (20, 33, None, 20)
    layers = [dataclasses.replace(layer, window=window) for layer, window in zip(config.layers, windows, strict=True)]
    layers[2] = dataclasses.replace(layers[2], values_are_keys=True, rope=RopeConfig(theta=1e4, rotated_pairs=2))
    return dataclasses.replace(
        config, layers=tuple(layers), qk_norm=True, v_norm=True, context_length=CONTEXT, stop_ids=(257,)
    )


def windowed_model(drafted: bool = False, scored: bool = False) -> Model:
    model = tiny_model(tiny_drafter() if drafted else None)
    scorer = tiny_target(seed=5, config=windowed()) if scored else None
    return dataclasses.replace(model, target=tiny_target(config=windowed()), scorer=scorer)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def build(model: Model, *, rings: bool = True, **options: Any) -> Engine:
        with monkeypatch.context() as patch:
            if not rings:
                patch.setattr(Profile, "ring", lambda *_: None)
            engines.append(Engine(model, **options))
        assert (engines[-1]._shared.programs.ring is not None) == rings
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def say(engine: Engine, chat: list[dict[str, str]], tokens: int = 12) -> Any:
    return engine.generate(chat, max_tokens=tokens, ignore_eos=True)


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_layers_with_a_window_have_small_pools(make: Callable[..., Engine]) -> None:
    engine = make(windowed_model(), pflash="off", max_sessions=1)
    ring, (local, other, full, last) = engine._shared.programs.ring, engine._shared.programs.pools.target
    assert ring is not None
    assert full[0].shape[2] == 4 and full[1].shape[2] == 16
    assert {len(pool[0]) for pool in (local, other, last)} == {(1 + ring.most_held) * 16}
    assert len(full[0]) > CONTEXT > 2 * len(local[0])


def test_a_model_without_windows_has_no_rings(make: Callable[..., Engine]) -> None:
    engine = make(tiny_model(), rings=False, pflash="off")
    assert engine._shared.programs.tables((), {}, 0).ring is None
    assert engine._shared.store._rings is None


@pytest.mark.parametrize("dflash", [pytest.param("off", marks=pytest.mark.slow), "on"])
def test_turns_forks_and_rollbacks_say_what_a_fresh_engine_says(make: Callable[..., Engine], dflash: str) -> None:
    model = windowed_model(drafted=dflash == "on")
    # Pools of three sessions have the sizes of other tests', whose programs they can run.
    engine = make(model, dflash=dflash, pflash="off", max_sessions=3)
    fresh = make(model, rings=False, dflash="off", pflash="off", max_sessions=3)
    cached: dict[str, int] = {}

    def check(name: str, chat: list[dict[str, str]], tokens: int = 12) -> Any:
        result = say(engine, chat, tokens)
        fresh._shared.store.forget_all()
        expected = say(fresh, chat, tokens)
        assert expected.stats.cached_tokens == 0
        assert result.token_ids == expected.token_ids, name
        cached[name] = result.stats.cached_tokens
        return result

    chat = [{"role": "system", "content": LONG}, QUESTION]
    first = check("first", chat, tokens=150)
    check("the turn once more", chat, tokens=9)
    thought_stripped = [*chat, said(first.text[-30:]), {"role": "user", "content": "Go on."}]
    second = check("the answer without its beginning", thought_stripped, tokens=40)
    whole = [*thought_stripped, said(second.text), {"role": "user", "content": LONG[:200]}]
    third = check("goes on", whole, tokens=200)
    check("goes on again", [*whole, said(third.text), QUESTION])
    check("the old answer as it was", [*chat, said(first.text), QUESTION])
    check("the same beginning, another question", [chat[0], {"role": "user", "content": "Why?"}])
    prompt = engine.count_tokens(chat)
    assert cached["first"] == 0
    assert cached["the turn once more"] >= prompt - 2
    assert cached["the answer without its beginning"] >= prompt - 2
    assert cached["goes on"] > prompt
    assert cached["the same beginning, another question"] == 0
    assert engine.gauges()["read_again_tokens"] > 0


@pytest.mark.parametrize(
    ("positions", "scored"),
    [
        pytest.param("original", False, marks=pytest.mark.slow),
        ("compact", False),
        pytest.param("compact", True, marks=pytest.mark.slow),
    ],
)
def test_pruned_conversations_say_what_they_say_without_rings(
    make: Callable[..., Engine], positions: str, scored: bool
) -> None:
    options = {"pflash": "on", "keep_ratio": 0.4, "positions": positions, "max_sessions": 2}
    model = windowed_model(drafted=True, scored=scored)
    engines = [make(model, **options), make(model, rings=False, dflash="off", **options)]
    chat = [{"role": "user", "content": LONG}, said("Done."), {"role": "user", "content": "What does line 4 say?"}]
    answers = [say(engine, chat, tokens=90) for engine in engines]
    assert answers[0].stats.pflash is not None
    assert answers[0].stats.pflash.kept_tokens < answers[0].stats.prompt_tokens
    assert answers[0].token_ids == answers[1].token_ids
    chat += [said(answers[1].text), {"role": "user", "content": LONG[::-1][:200]}, {"role": "user", "content": "And?"}]
    again = [say(engine, chat) for engine in engines]
    assert again[0].stats.cached_tokens == again[1].stats.cached_tokens > 0
    assert again[0].token_ids == again[1].token_ids


@pytest.mark.slow
def test_sessions_that_take_turns_and_are_evicted_stay_right(make: Callable[..., Engine]) -> None:
    engine = make(windowed_model(), pflash="off", max_sessions=1)
    fresh = make(windowed_model(), rings=False, dflash="off", pflash="off", max_sessions=3)
    chats = [[{"role": "user", "content": f"{n} {LONG[: 90 * n]}"}] for n in range(1, 4)]
    for _ in range(3):
        for chat in chats:
            result, expected = (say(each, chat, tokens=20) for each in (engine, fresh))
            assert result.token_ids == expected.token_ids
            chat += [said(result.text), {"role": "user", "content": "Go on."}]


@pytest.mark.slow
def test_nothing_is_compiled_while_serving_with_rings(make: Callable[..., Engine]) -> None:
    engine = make(windowed_model(drafted=True), pflash="on", keep_ratio=0.5)
    engine.warm_up()
    before = engine.gauges()["compilations"]
    chat = [{"role": "user", "content": LONG}, QUESTION]
    for _ in range(3):
        chat += [said(say(engine, chat, tokens=100).text), QUESTION]
    say(engine, chat[:2])
    assert engine.gauges()["compilations"] == before
