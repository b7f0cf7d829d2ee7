"""The whole engine on a tiny random target: prompts in, events out."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import checkpoints
from dflash_jax.engine import self_check
from dflash_jax.engine.engine import Engine
from dflash_jax.engine.programs import Programs
from dflash_jax.engine.request import (
    EngineWarning,
    Event,
    Finished,
    OverloadedError,
    Request,
    RequestError,
    Sampling,
    TextDelta,
)
from dflash_jax.engine.tokenizer import IncrementalDecoder
from tests.tiny import DRAFTER, ScriptedDrafter, tiny_drafter, tiny_model

CHAT = [{"role": "user", "content": "Say something."}]
LONG = "".join(f"Line {n} of the document says {n * 7919 % 1000}.\n" for n in range(9))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(tiny_model(), pflash="off")
    engine.warm_up()
    yield engine
    engine.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def build(*arguments: Any, **options: Any) -> Engine:
        engines.append(Engine(*arguments, **options))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


class Collector:
    """Gathers the events of a request."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.ids: list[int] = []

    def __call__(self, event: Event) -> None:
        self.events.put(event)

    def finish(self) -> Finished:
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, Finished):
                return event
            self.ids.extend(event.token_ids)


@pytest.mark.slow
def test_an_answer_that_is_begun_for_the_model(engine: Engine) -> None:
    ends = []

    def start(prompt_end: str) -> str:
        ends.append(prompt_end)
        return "So, "

    def run(**request: Any) -> tuple[list[int], int]:
        collector = Collector()
        engine.submit(Request(**request, sampling=Sampling(max_tokens=8, ignore_eos=True)), collector)
        return (collector.ids, collector.finish().stats.prompt_tokens)

    begun = run(messages=CHAT, answer_start=start)
    assert begun == run(messages=[*CHAT, {"role": "assistant", "content": "So, "}], continue_final=True)
    plain = run(messages=CHAT)
    assert plain[0] != begun[0] and plain[1] < begun[1]
    assert ends == [engine.submit(Request(messages=CHAT), lambda _: None).prompt_end]


def test_same_tokens_without_drafter_with_random_drafter_and_with_oracle(make: Callable[..., Engine]) -> None:
    plain = make(tiny_model(), dflash="off", pflash="off").generate(CHAT, max_tokens=40, ignore_eos=True)
    assert plain.stats.dflash is None
    assert len(plain.token_ids) == 40
    prompt_tokens = plain.stats.prompt_tokens

    random = make(tiny_model(tiny_drafter()), dflash="on", pflash="off").generate(CHAT, max_tokens=40, ignore_eos=True)
    assert random.token_ids == plain.token_ids

    script = [0] * prompt_tokens + list(plain.token_ids)
    model = tiny_model()
    oracle_model = tiny_model(ScriptedDrafter(model.target, script))
    oracle = make(oracle_model, dflash="on", pflash="off").generate(CHAT, max_tokens=40, ignore_eos=True)
    assert oracle.token_ids == plain.token_ids
    assert oracle.stats.dflash is not None
    assert oracle.stats.dflash.verify_steps == 3


@pytest.mark.slow
def test_a_drafter_of_shorter_blocks(make: Callable[..., Engine]) -> None:
    plain = make(tiny_model(), dflash="off", pflash="off").generate(CHAT, max_tokens=30, ignore_eos=True)
    drafter = tiny_drafter(config=dataclasses.replace(DRAFTER, block_size=8))
    short = make(tiny_model(drafter), dflash="on", pflash="off").generate(CHAT, max_tokens=30, ignore_eos=True)
    assert short.token_ids == plain.token_ids
    assert short.stats.dflash is not None


@pytest.mark.slow
def test_prompts_scored_side_by_side_share_the_room_for_it(make: Callable[..., Engine]) -> None:
    engine = make(tiny_model(context_length=460), context_length=460, max_sessions=6, pflash="on", keep_ratio=0.5)
    collectors = [Collector() for _ in range(6)]
    for number, collector in enumerate(collectors):
        chat = [{"role": "user", "content": f"{number} {LONG}"}, {"role": "assistant", "content": "Yes."}, *CHAT]
        engine.submit(Request(messages=chat, sampling=Sampling(max_tokens=8, ignore_eos=True)), collector)
    assert {collector.finish().reason for collector in collectors} == {"length"}


def test_a_temperature_next_to_nothing_is_greedy(engine: Engine) -> None:
    asked = {"max_tokens": 12, "ignore_eos": True}
    greedy = engine.generate(CHAT, **asked).token_ids
    assert engine.generate(CHAT, temperature=2e-38, top_p=1e-40, **asked).token_ids == greedy


def test_self_check_warns_of_a_drafter_that_is_never_right(make: Callable[..., Engine]) -> None:
    engine = make(tiny_model(tiny_drafter()), dflash="auto", pflash="off")
    warning = engine.self_check()
    assert warning is not None and "WARNING" in warning and "mask id" in warning
    assert 1.0 <= engine.gauges()["drafter_self_check_accept_length"] < 1.5
    assert make(tiny_model(), pflash="off").self_check() is None


def test_self_check_is_content_with_a_drafter_that_is_right(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "PROMPTS", self_check.PROMPTS[:1])
    chat = [{"role": "user", "content": self_check.PROMPTS[0]}]
    plain = make(tiny_model(), dflash="off", pflash="off")
    ids = plain.generate(chat, max_tokens=self_check.TOKENS, ignore_eos=True).token_ids
    script = [0] * plain.count_tokens(chat) + list(ids)
    oracle = make(tiny_model(ScriptedDrafter(tiny_model().target, script)), dflash="auto", pflash="off")
    assert oracle.self_check() is None
    assert oracle.gauges()["drafter_self_check_accept_length"] == 16.0


def test_a_conversation_that_goes_on_needs_little_prefill_and_answers_the_same(
    engine: Engine, make: Callable[..., Engine]
) -> None:
    first = engine.generate(CHAT, max_tokens=12, ignore_eos=True)
    chat = [*CHAT, {"role": "assistant", "content": first.text}, {"role": "user", "content": "Go on."}]
    second = engine.generate(chat, max_tokens=12, ignore_eos=True)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens
    fresh = make(tiny_model(), pflash="off").generate(chat, max_tokens=12, ignore_eos=True)
    assert fresh.stats.cached_tokens == 0
    assert second.token_ids == fresh.token_ids


def test_answers_side_by_side_are_those_of_one_after_the_other(engine: Engine) -> None:
    chats = [[{"role": "user", "content": f"Question {n}: {'why? ' * (7 * n)}"}] for n in range(5)]
    alone = [engine.generate(chat, max_tokens=15, ignore_eos=True).token_ids for chat in chats]
    collectors = [Collector() for _ in chats]
    for chat, collector in zip(chats, collectors, strict=True):
        engine.submit(Request(messages=chat, sampling=Sampling(max_tokens=15, ignore_eos=True)), collector)
    for collector, expected in zip(collectors, alone, strict=True):
        assert collector.finish().reason == "length"
        assert tuple(collector.ids) == expected


def test_a_seed_decides_a_sampled_answer(engine: Engine) -> None:
    options = {"max_tokens": 20, "temperature": 1.5, "ignore_eos": True}
    one, two = (engine.generate(CHAT, seed=5, **options).token_ids for _ in range(2))
    assert one == two
    assert engine.generate(CHAT, seed=6, **options).token_ids != one


def test_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    whole = engine.generate(CHAT, max_tokens=30, ignore_eos=True)
    stop = whole.text[8:11]
    cut = engine.generate(CHAT, max_tokens=30, ignore_eos=True, stop=stop)
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_tokens_after_a_stop_string_do_not_count(make: Callable[..., Engine], engine: Engine) -> None:
    whole = engine.generate(CHAT, max_tokens=30, ignore_eos=True)
    tokenizer = engine._tokenizer
    assert tokenizer is not None
    texts = [IncrementalDecoder(tokenizer).push(whole.token_ids[:count]) for count in range(31)]
    stop = whole.text[8:11]
    needed = next(count for count, text in enumerate(texts) if stop in text)
    # A drafter that knows the answer, so that a visit brings many tokens.
    script = [0] * whole.stats.prompt_tokens + list(whole.token_ids)
    drafting = make(tiny_model(ScriptedDrafter(tiny_model().target, script)), dflash="on", pflash="off")
    cut = drafting.generate(CHAT, max_tokens=30, ignore_eos=True, stop=stop)
    assert cut.stats.dflash is not None
    assert needed < 16 <= cut.stats.dflash.committed_tokens
    assert cut.token_ids == whole.token_ids[:needed]
    assert cut.stats.completion_tokens == needed


def test_closing_leaves_what_runs_to_the_device_thread(make: Callable[..., Engine]) -> None:
    class OwnThreadOnly(list):
        def __iter__(self) -> Iterator[Any]:
            assert threading.current_thread().name == "dflash-jax device"
            return super().__iter__()

    engine = make(tiny_model(), pflash="off")
    runner = engine._running()
    runner._running = OwnThreadOnly()
    collectors = [Collector() for _ in range(8)]
    for collector in collectors:
        engine.submit(Request(messages=CHAT, sampling=Sampling(ignore_eos=True)), collector)
    assert isinstance(collectors[0].events.get(timeout=60), TextDelta)
    engine.close()
    assert {collector.finish().reason for collector in collectors} == {"cancelled"}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"dflash": "on"}, "DFlash is on but there is no drafter"),
        ({"context_length": 513}, "a context of 513 tokens was asked for, the model has 512"),
    ],
)
def test_options_that_do_nothing_are_told_of(make: Callable[..., Engine], options: dict, found: str) -> None:
    with pytest.warns(EngineWarning, match=found):
        engine = make(tiny_model(), pflash="off", **options)
    assert engine.context_length == 512


def test_prompt_beyond_the_window_is_refused_and_max_tokens_is_clamped(engine: Engine) -> None:
    with pytest.raises(RequestError, match="maximum context length is 512") as refused:
        engine.generate([{"role": "user", "content": "x" * 600}])
    assert refused.value.code == "context_length_exceeded"
    near = engine.generate([{"role": "user", "content": "x" * 470}], max_tokens=10_000, ignore_eos=True)
    assert near.stats.prompt_tokens + near.stats.completion_tokens == 512


@pytest.mark.parametrize(
    "messages", [[], "text", [{"role": "wizard", "content": "x"}], [{"role": "user", "content": 5}]]
)
def test_wrong_messages_are_refused(engine: Engine, messages: Any) -> None:
    with pytest.raises(RequestError):
        engine.submit(Request(messages=messages), lambda event: None)


def test_cancelled_request_ends_and_frees_its_slot(engine: Engine) -> None:
    collector = Collector()
    handle = engine.submit(Request(messages=CHAT, sampling=Sampling(ignore_eos=True)), collector)
    assert isinstance(collector.events.get(timeout=60), TextDelta)
    handle.cancel()
    finished = collector.finish()
    assert finished.reason == "cancelled"
    assert finished.stats.completion_tokens < 400
    engine.generate(CHAT, max_tokens=1)
    assert engine.gauges()["active_sessions"] == 0


def test_full_queue_refuses_and_closing_drains(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    original = Programs.decode

    def slow(self: Programs, *arguments: Any, **options: Any) -> Any:
        gate.wait(60)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Programs, "decode", slow)
    engine = make(tiny_model(), pflash="off")
    collectors = []
    with pytest.raises(OverloadedError, match="queue is full"):
        for _ in range(80):
            collector = Collector()
            engine.submit(Request(messages=CHAT, sampling=Sampling(max_tokens=1)), collector)
            collectors.append(collector)
    assert len(collectors) >= 64
    gate.set()
    engine.close(drain=True)
    assert {collector.finish().reason for collector in collectors} <= {"stop", "length"}
    with pytest.raises(OverloadedError, match="shutting down"):
        engine.submit(Request(messages=CHAT), lambda event: None)


def test_a_fault_fails_one_answer_and_the_next_finds_a_working_engine(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tiny_model(), pflash="off")
    expected = engine.generate(CHAT, max_tokens=8, ignore_eos=True).token_ids
    original = Programs.decode

    def broken(self: Programs, *arguments: Any, **options: Any) -> Any:
        original(self, *arguments, **options)
        for pool in self.pools.target:
            pool[0].delete()
        raise RuntimeError("the device fell over")

    monkeypatch.setattr(Programs, "decode", broken)
    with pytest.raises(RuntimeError, match="fell over"):
        engine.generate(CHAT, max_tokens=8)
    monkeypatch.setattr(Programs, "decode", original)
    again = engine.generate(CHAT, max_tokens=8, ignore_eos=True)
    assert again.token_ids == expected
    assert again.stats.cached_tokens == 0


def test_a_chunk_that_fails_after_it_was_sent_fails_one_answer(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device tells only when somebody waits for it, and all that comes after holds the same error."""

    class Failed:
        def block_until_ready(self) -> None:
            raise RuntimeError("the device fell over")

    engine = make(tiny_model(), pflash="off")
    expected = engine.generate(CHAT, max_tokens=8, ignore_eos=True).token_ids
    original = Programs.prefill_chunk

    def broken(self: Programs, *arguments: Any) -> None:
        original(self, *arguments)
        self._last_chunk = cast("Any", Failed())

    monkeypatch.setattr(Programs, "prefill_chunk", broken)
    other = [{"role": "user", "content": "something else"}]
    with pytest.raises(RuntimeError, match="fell over"):
        engine.generate(other, max_tokens=8)
    monkeypatch.setattr(Programs, "prefill_chunk", original)
    again = engine.generate(CHAT, max_tokens=8, ignore_eos=True)
    assert again.token_ids == expected
    assert again.stats.cached_tokens == 0  # nothing was left


def test_another_answers_chunk_is_not_the_time_of_a_step(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tiny_model(), pflash="off")
    waited: list[str] = []
    wait, decode = Programs.wait_for_chunks, Programs.decode
    monkeypatch.setattr(Programs, "wait_for_chunks", lambda self: (waited.append("wait"), wait(self))[1])
    monkeypatch.setattr(
        Programs, "decode", lambda self, *given, **options: (waited.append("visit"), decode(self, *given, **options))[1]
    )
    engine.generate(CHAT, max_tokens=40, ignore_eos=True)
    visits = [index for index, what in enumerate(waited) if what == "visit"]
    assert visits and all(waited[index - 1] == "wait" for index in visits)


def test_a_handler_that_raises_does_not_stop_the_engine(engine: Engine) -> None:
    def handler(event: Event) -> None:
        raise ValueError("the client is gone")

    engine.submit(Request(messages=CHAT, sampling=Sampling(max_tokens=4)), handler)
    assert engine.generate(CHAT, max_tokens=4, ignore_eos=True).stats.completion_tokens == 4


def test_nothing_is_compiled_while_serving(make: Callable[..., Engine]) -> None:
    engine = make(tiny_model(tiny_drafter()), pflash="on", keep_ratio=0.5)
    engine.warm_up()
    before = engine.gauges()["compilations"]
    for length in (1, 9, 33, 100, 300):
        engine.generate([{"role": "user", "content": "y" * length}], max_tokens=40, ignore_eos=True)
    engine.generate(CHAT, max_tokens=5, temperature=0.7, top_k=5, top_p=0.9, seed=1)
    pruned = engine.generate([{"role": "user", "content": LONG}, {"role": "user", "content": "Well?"}], max_tokens=9)
    assert pruned.stats.pflash is not None
    assert engine.gauges()["compilations"] == before


@pytest.mark.parametrize("positions", [pytest.param("original", marks=pytest.mark.slow), "compact"])
def test_pruned_prompt_keeps_its_budget_and_only_grows(make: Callable[..., Engine], positions: Any) -> None:
    engine = make(tiny_model(context_length=1024), pflash="on", keep_ratio=0.25, positions=positions)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "What does line 4 say?"},
    ]
    first = engine.generate(chat, max_tokens=6, ignore_eos=True)
    assert first.stats.pflash is not None
    dropped = first.stats.prompt_tokens - first.stats.pflash.kept_tokens
    assert dropped >= 0.75 * len(LONG) - 1
    assert first.stats.pflash.kept_tokens > first.stats.prompt_tokens - len(LONG)
    session = engine._shared.store._sessions[0]
    frozen = session.kept.copy()
    chat += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": LONG[::-1]},
        {"role": "user", "content": "And?"},
    ]
    second = engine.generate(chat, max_tokens=6, ignore_eos=True)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens
    assert np.array_equal(session.kept[: first.stats.prompt_tokens], frozen[: first.stats.prompt_tokens])
    assert second.stats.pflash is not None
    assert second.stats.pflash.scored_tokens < second.stats.prompt_tokens
    new = slice(second.stats.prompt_tokens - second.stats.pflash.scored_tokens, second.stats.prompt_tokens)
    assert second.stats.pflash.kept_tokens == session.kept[new].sum()


@pytest.mark.slow
def test_keep_ratio_of_one_changes_nothing(make: Callable[..., Engine], engine: Engine) -> None:
    chat = [{"role": "user", "content": LONG}, {"role": "user", "content": "Well?"}]
    pruning = make(tiny_model(), pflash="on", keep_ratio=1.0)
    assert (
        pruning.generate(chat, max_tokens=9, ignore_eos=True).token_ids
        == engine.generate(chat, max_tokens=9, ignore_eos=True).token_ids
    )


def test_a_scorer_of_its_own(make: Callable[..., Engine]) -> None:
    model = tiny_model()
    engine = make(dataclasses.replace(model, scorer=model.target), pflash="on", keep_ratio=0.3)
    chat = [{"role": "user", "content": LONG}, {"role": "user", "content": "Well?"}]
    collectors = [Collector(), Collector()]
    for collector in collectors:
        engine.submit(Request(messages=chat, sampling=Sampling(max_tokens=5, ignore_eos=True)), collector)
    stats = [collector.finish().stats for collector in collectors]
    assert all(s.pflash is not None and s.pflash.kept_tokens < s.prompt_tokens for s in stats)
    assert collectors[0].ids == collectors[1].ids


def test_without_dflash_the_default_drafter_is_not_loaded(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(progress: object) -> Path:
        raise AssertionError("asked for the drafter")

    monkeypatch.setattr(checkpoints, "default_model", lambda progress: goldens / "qwen3")
    monkeypatch.setattr(checkpoints, "default_drafter", refuse)
    Engine.load(dflash="off", pflash="off").close()
    with pytest.raises(AssertionError, match="asked for the drafter"):
        Engine.load(dflash="auto", pflash="off")


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5])
def test_keep_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="keep ratio"):
        Engine(tiny_model(), keep_ratio=ratio)
