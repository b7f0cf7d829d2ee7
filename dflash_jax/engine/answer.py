"""One answer from prompt to last token, as a generator that yields after each visit to the device.

The runner takes turns between answers, so a long prompt never keeps another answer waiting for more than two chunks.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator

import jax
import numpy as np

from dflash_jax.cache.sessions import Session, SessionStore
from dflash_jax.compress.policy import droppable, question_tokens
from dflash_jax.compress.prune import Gate, Positions, rope_positions, select
from dflash_jax.compress.score import QUESTION_ROWS
from dflash_jax.compress.spans import Prompt
from dflash_jax.control.degenerate import degenerate
from dflash_jax.control.rules import Rule, update
from dflash_jax.control.state import Observation
from dflash_jax.engine.extras import LogprobStream, extras_of, with_answer
from dflash_jax.engine.programs import Programs, Tables, chunks_of, new_slots, put, sampling_parameters
from dflash_jax.engine.request import (
    DflashStats,
    Event,
    Finished,
    FinishReason,
    Marker,
    PflashScope,
    PflashStats,
    Sampling,
    Stats,
    TextDelta,
    TokenLogprobs,
)
from dflash_jax.engine.stop import StopFinder
from dflash_jax.engine.tokenizer import IncrementalDecoder, Tokenizer
from dflash_jax.speculate.logprobs import Logprobs
from dflash_jax.speculate.pace import PLAIN, Pace, StepTimes

follow = jax.jit(update, static_argnames="rule")
"""The controller's rule as one program."""


@dataclasses.dataclass
class Shared:
    """What all answers of an engine share; owned by the device thread. `times` changes as visits are measured."""

    programs: Programs
    store: SessionStore
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    gate: Gate
    scope: PflashScope
    positions: Positions
    dflash: str
    rule: Rule
    fixed_keep_ratio: float | None
    times: StepTimes
    scorer_busy: bool = False
    """Whether an answer is scoring its prompt: there is room for one at a time."""


@dataclasses.dataclass(eq=False)
class Job:
    """A request that was accepted: its prompt, how to sample, and where events go."""

    prompt: Prompt
    sampling: Sampling
    max_tokens: int
    seed: int
    session: str | None
    on_event: Callable[[Event], None]
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    cancelled: bool = False


class Answer:
    """The state of one running answer. `steps()` does the work; `finish` reports the end exactly once."""

    def __init__(self, job: Job, shared: Shared) -> None:
        self.job = job
        self._shared = shared
        self._generated: list[int] = []
        self._steps = 0
        self._drafted: Counter[int] = Counter()
        """How many steps that drafted committed so many tokens."""
        self._cached = 0
        self._prefilled: float | None = None
        self._first_token: float | None = None
        self._pflash: PflashStats | None = None
        self._compressed = False
        self._finished = False
        tokenizer = shared.tokenizer
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer else None
        self._stop = StopFinder(job.sampling.stop)
        self._logprobs: LogprobStream | None = None
        if tokenizer and job.sampling.logprobs is not None:
            self._logprobs = LogprobStream(tokenizer, job.sampling.logprobs)
        self._characters, self._shown = 0, 0
        self._reason: FinishReason = "length"

    def steps(self) -> Generator[None, None, None]:
        """Runs the answer; yields after each visit to the device. Closing it frees the session's slot."""
        shared, job = self._shared, self.job
        session, known = shared.store.begin(job.prompt.token_ids, job.session)
        self._cached = (
            int(np.flatnonzero(session.kept)[session.length]) if session.length < session.kept.sum() else known
        )
        try:
            kept = np.ones(len(job.prompt) - known, np.bool_)
            keep_ratio = self._keep_ratio(session)
            mask = droppable(job.prompt, shared.scope)[known:]
            if shared.gate.opens(new_tokens=len(mask), droppable=int(mask.sum()), keep_ratio=keep_ratio):
                kept = yield from self._compress(session, known, mask, keep_ratio)
            session.ids = job.prompt.token_ids
            session.kept = np.concatenate([session.kept, kept])
            session.prompt_length = len(job.prompt)
            self._compressed = not session.kept.all()
            yield from self._prefill(session)
            self._prefilled = time.perf_counter()
            yield from self._decode(session)
            self._observe(session)
        finally:
            shared.store.end(session)
        self.finish(self._reason)

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """Sends the rest of the text and the last event, once."""
        if self._finished:
            return
        self._finished = True
        if reason in ("stop", "length") and self._decoder is not None:
            tail, hit = self._stop.push(self._decoder.flush())
            tail += "" if hit else self._stop.flush()
            logprobs = self._take_logprobs(tail, last=not hit)
            if tail or logprobs:
                self.job.on_event(TextDelta(tail, (), logprobs=logprobs))
        self.job.on_event(Finished(reason, self._stats(), error))

    def _keep_ratio(self, session: Session) -> float:
        fixed = self._shared.fixed_keep_ratio
        return float(session.controller.keep_ratio) if fixed is None else fixed

    def _compress(
        self, session: Session, known: int, mask: np.ndarray, keep_ratio: float
    ) -> Generator[None, None, np.ndarray]:
        """Scores what is new in the prompt (all after the first `known` tokens) and returns which of it is kept."""
        shared, prompt = self._shared, self.job.prompt
        programs, store = shared.programs, shared.store
        while shared.scorer_busy:
            yield
        started = time.perf_counter()
        readable = np.concatenate([session.kept, np.ones(len(mask), np.bool_)])
        ids, positions = prompt.token_ids[readable], rope_positions(readable, shared.positions)
        branch: Session | None = None
        shared.scorer_busy = True
        try:
            if not programs.has_own_scorer:
                # The session's own KV is the beginning of what the scorer reads; the rest is on pages of the branch.
                branch = store.branch(session)
                store.grow(branch, len(ids) + QUESTION_ROWS)
            start = branch.length if branch else 0
            tables = programs.tables(branch.pages, branch.ring, start) if branch else programs.scorer_tables()
            reading = programs.begin_reading(tables, start, len(ids))
            for begin, end in chunks_of(len(ids) - start, programs.profile):
                rows = slice(start + begin, start + end)
                tables = self._tables(branch, end - begin) if branch else programs.scorer_tables()
                reading = programs.read_for_scoring(
                    reading, ids[rows], positions[rows], tables, start + begin, begin, len(ids)
                )
                if branch:
                    branch.length = start + end
                yield
            question = question_tokens(prompt, QUESTION_ROWS)
            question = ids[-QUESTION_ROWS:] if question is None else question
            after = np.arange(QUESTION_ROWS, dtype=np.int32)
            asked = question[after % len(question)]
            tables = self._tables(branch, QUESTION_ROWS) if branch else programs.scorer_tables()
            scores = programs.score(reading, asked, positions[-1] + 1 + after, tables, len(ids), len(ids) - start)
            # Tokens before the new ones may be read again (a separate scorer reads all); they are not up for selection.
            again = len(ids) - start - len(mask)
            kept = select(scores, np.concatenate([np.zeros(again, np.bool_), mask]), keep_ratio)[again:]
        finally:
            if branch:
                store.release(branch)
            shared.scorer_busy = False
        milliseconds = 1000 * (time.perf_counter() - started)
        self._pflash = PflashStats(len(mask), int(kept.sum()), keep_ratio, milliseconds)
        return kept

    def _prefill(self, session: Session) -> Iterator[None]:
        """Stores K and V of the kept prompt but its last token, which is the first anchor."""
        shared = self._shared
        ids, positions = session.ids[session.kept], rope_positions(session.kept, shared.positions)
        shared.store.grow(session, len(ids))
        start = session.length
        for begin, end in chunks_of(len(ids) - 1 - start, shared.programs.profile):
            rows = slice(start + begin, start + end)
            tables = self._tables(session, end - begin)
            shared.programs.prefill_chunk(ids[rows], positions[rows], tables, start + begin)
            session.length = start + end
            yield
        shared.programs.wait_for_chunks()

    def _tables(self, session: Session, ahead: int) -> Tables:
        """The session's tables for so many tokens past its length, for which its ring slides on."""
        self._shared.store.slide(session, ahead)
        return self._shared.programs.tables(session.pages, session.ring, session.length)

    def _decode(self, session: Session) -> Iterator[None]:
        shared, job = self._shared, self.job
        programs, profile = shared.programs, shared.programs.profile
        sampling = job.sampling
        compact = int(session.kept.sum()) - 1
        slots = new_slots(
            self._tables(session, 0),
            length=session.length,
            position=compact if shared.positions == "compact" else len(session.ids) - 1,
            anchor=int(session.ids[-1]),
            limit=job.max_tokens,
            stop_ids=() if sampling.ignore_eos else shared.stop_ids,
        )
        parameters = sampling_parameters(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=job.seed,
        )
        if sampling.asks_for_extras:
            extras = extras_of(sampling, job.prompt.token_ids, programs.vocabulary)
            parameters = dataclasses.replace(parameters, extras=put(extras))
        pace = Pace()
        while True:
            rows = PLAIN
            if programs.block_rows:
                rows = pace.best_block(shared.times) if shared.dflash == "on" else pace.rows(shared.times)
            max_steps = max(1, min(profile.max_steps, round(profile.visit_seconds / shared.times.of(rows))))
            if self._grow(session, max_steps * (rows or profile.plain_rows) + profile.block_rows[-1]):
                tables = programs.tables(session.pages, session.ring, session.length)
                slots = dataclasses.replace(slots, page_table=put(tables.pages), ring_table=put(tables.ring))
            if sampling.penalises and parameters.extras is not None:
                parameters = dataclasses.replace(
                    parameters, extras=put(with_answer(parameters.extras, self._generated))
                )
            programs.wait_for_chunks()  # of another answer's prompt: they are not this visit's time
            started = time.perf_counter()
            visit, slots = programs.decode(slots, parameters, rows, max_steps=max_steps)
            tokens = np.asarray(visit.tokens)[0, : int(visit.count[0])]
            steps = int(visit.steps)
            seconds = time.perf_counter() - started
            shared.times = shared.times.observe(rows, steps=steps, seconds=seconds)
            pace = pace.observe(shared.times, rows, visit.steps_by_count[0].tolist())
            self._take(session, tokens, steps)
            if rows != PLAIN:
                self._drafted.update(dict(enumerate(visit.steps_by_count[0].tolist())))
            logprobs = jax.device_get(visit.logprobs) if self._logprobs else None
            if self._emit(tokens, logprobs) or len(self._generated) >= job.max_tokens:
                return
            yield

    def _grow(self, session: Session, ahead: int) -> bool:
        """Pages for so many tokens ahead, as far as a sequence may go; whether tables have changed."""
        shared, pages, ring = self._shared, list(session.pages), dict(session.ring)
        longest = shared.programs.pages_per_sequence * shared.store.page_size
        shared.store.grow(session, min(session.length + ahead, longest))
        shared.store.slide(session, ahead)
        return (pages, ring) != (session.pages, session.ring)

    def _take(self, session: Session, tokens: np.ndarray, steps: int) -> None:
        session.ids = np.concatenate([session.ids, tokens])
        session.kept = np.concatenate([session.kept, np.ones(len(tokens), np.bool_)])
        session.length += len(tokens)
        self._steps += steps

    def _emit(self, tokens: np.ndarray, logprobs: Logprobs | None = None) -> bool:
        """Streams the text of new tokens; whether the answer has ended."""
        if self._first_token is None:
            self._first_token = time.perf_counter()
        ended = not self.job.sampling.ignore_eos and len(tokens) > 0 and int(tokens[-1]) in self._shared.stop_ids
        text, markers, hit = "", (), False
        if self._decoder is not None:
            # A stop token ends the answer and is not part of its text, special or not.
            text, markers, read, hit = self._read(tokens[:-1] if ended else tokens, logprobs)
            tokens = tokens[:read] if hit else tokens
        self._generated.extend(tokens.tolist())
        self.job.on_event(TextDelta(text, tuple(tokens.tolist()), markers, self._take_logprobs(text)))
        if ended or hit:
            self._reason = "stop"
        return ended or hit

    def _read(self, tokens: np.ndarray, logprobs: Logprobs | None) -> tuple[str, tuple[Marker, ...], int, bool]:
        """Text and markers of tokens up to a stop string, how many tokens these are, and whether there is one."""
        tokenizer, decoder = self._shared.tokenizer, self._decoder
        assert tokenizer is not None
        assert decoder is not None
        text, markers, count, hit = "", [], 0, False
        while count < len(tokens) and not hit:
            token = int(tokens[count])
            if self._logprobs is not None and logprobs is not None:
                self._logprobs.add(self._characters, logprobs, count)
            decoded = decoder.push(token)
            shown, hit = self._stop.push(decoded)
            text, count, self._characters = text + shown, count + 1, self._characters + len(decoded)
            if token in tokenizer.markup_ids:
                hidden, string = token in tokenizer.special_ids, tokenizer.token(token) or ""
                markers.append(Marker(self._characters - (0 if hidden else len(string)), string, hidden))
        return text, tuple(markers), count, hit

    def _take_logprobs(self, text: str, *, last: bool = False) -> tuple[TokenLogprobs, ...]:
        """Those that go with the next piece of text, which is shown; all there are when it is the last."""
        self._shown += len(text)
        if self._logprobs is None:
            return ()
        return self._logprobs.rest() if last else self._logprobs.take(self._shown)

    def _observe(self, session: Session) -> None:
        if self._shared.fixed_keep_ratio is not None:
            return
        drafted = self._dflash_stats()
        observation = Observation(
            accept_length=np.float32(drafted.accept_length if drafted else 0.0),
            steps=np.int32(drafted.verify_steps if drafted else 0),
            degenerate=np.bool_(degenerate(np.asarray(self._generated, np.int32))),
            compressed=np.bool_(self._compressed),
        )
        session.controller = follow(self._shared.rule, session.controller, observation)

    def _stats(self) -> Stats:
        now = time.perf_counter()
        first = self._first_token if self._first_token is not None else now
        return Stats(
            prompt_tokens=len(self.job.prompt),
            cached_tokens=self._cached,
            completion_tokens=len(self._generated),
            time_to_first_token=first - self.job.submitted,
            total_time=now - self.job.submitted,
            decode_time=now - self._prefilled if self._prefilled is not None else 0.0,
            pflash=self._pflash,
            dflash=self._dflash_stats(),
        )

    def _dflash_stats(self) -> DflashStats | None:
        counts = tuple(self._drafted[count] for count in range(1 + max(self._drafted, default=0)))
        steps, tokens = sum(counts), sum(count * number for count, number in enumerate(counts))
        return DflashStats(steps, tokens, counts) if steps else None
