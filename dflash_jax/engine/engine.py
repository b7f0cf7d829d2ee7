"""The engine as the server, the benchmarks and Python programs see it."""

from __future__ import annotations

import dataclasses
import functools
import queue
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints.fit import kv_cost
from dflash_jax.cache.pages import PageAllocator
from dflash_jax.cache.sessions import RingPages, SessionStore
from dflash_jax.compress.prune import Gate, Mode, Positions
from dflash_jax.compress.score import QUESTION_ROWS, Depth, Sparse, early_exit, empty_keys, full_depth
from dflash_jax.compress.spans import Prompt
from dflash_jax.control.rules import Rule, initial
from dflash_jax.control.state import Observation
from dflash_jax.engine import self_check
from dflash_jax.engine.answer import Job, Shared, follow
from dflash_jax.engine.chat import begin_answer, build_prompt, text_prompt
from dflash_jax.engine.compilation import compilations
from dflash_jax.engine.loading import Model, Progress, load_model
from dflash_jax.engine.profile import Profile
from dflash_jax.engine.programs import Programs
from dflash_jax.engine.request import (
    EngineWarning,
    Event,
    Finished,
    PflashScope,
    Request,
    RequestError,
    Result,
    Sampling,
    TextDelta,
)
from dflash_jax.engine.room import Reserved, free_bytes, reserve, weight_bytes
from dflash_jax.engine.runner import Runner
from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.decoder import Decoder
from dflash_jax.speculate.pace import StepTimes

_END_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Handle:
    """A submitted request."""

    _runner: Runner
    _job: Job
    prompt_end: str = ""
    """The last characters of the prompt, special tokens included: what the answer, its start included, goes on from."""

    def cancel(self) -> None:
        """Ends the request before its next block; its last event says "cancelled" unless it has already ended."""
        self._runner.cancel(self._job)


class Engine:
    """One target, perhaps a drafter and a scorer, and the thread that runs them. `Engine.load` makes one from files."""

    def __init__(
        self,
        model: Model,
        *,
        dflash: Mode = "auto",
        pflash: Mode = "auto",
        keep_ratio: float | None = None,
        pflash_scope: PflashScope = "agent",
        positions: Positions = "compact",
        rule: Rule = "relative",
        context_length: int | None = None,
        max_sessions: int | None = None,
        bsa: bool = False,
        tree: int | None = None,
    ) -> None:
        if keep_ratio is not None and not 0 < keep_ratio <= 1:
            raise ValueError(f"keep ratio {keep_ratio} is not in (0, 1]: give the fraction of prompt tokens to keep")
        model = dataclasses.replace(model, profile=model.profile.with_tree(tree))
        if tree and model.drafter is None:
            _warn("a tree needs a drafter, and there is none")
        target, scorer, profile = model.target, model.scorer, model.profile
        if dflash == "on" and model.drafter is None:
            _warn("DFlash is on but there is no drafter, so that nothing is drafted: name one (--drafter)")
        self.model_id = model.model_id
        reserved = _reserve(model, context_length, max_sessions, drafts=dflash != "off", scores=pflash != "off")
        self.context_length, max_sessions = reserved.context_length, reserved.max_sessions
        self._tokenizer, self._template = model.tokenizer, model.template
        self.chat_template = model.template.source
        self._scores = pflash != "off"
        depth = _depth(model)
        pages_per_sequence = _pages(self.context_length, profile)
        # Every running answer can grow to the whole window, and one prompt can be scored beside them.
        sequences = max_sessions + self._scores
        num_pages = 1 + sequences * pages_per_sequence
        ring = profile.ring(target.config, pages_per_sequence)
        num_ring_pages = 1 + sequences * ring.most_held if ring else 1
        programs = Programs(
            target,
            model.drafter if dflash != "off" else None,
            scorer,
            depth,
            profile=profile,
            num_pages=num_pages,
            pages_per_sequence=pages_per_sequence,
            ring=ring,
            num_ring_pages=num_ring_pages,
            sparse=Sparse() if bsa else None,
        )
        store = SessionStore(
            num_pages=num_pages,
            page_size=profile.page_size,
            new_controller=lambda: initial(rule, keep_ratio),
            copy_page=programs.copy_page,
            rings=RingPages(ring, PageAllocator(num_ring_pages), programs.copy_ring_page) if ring else None,
        )
        cost = depth.num_layers / target.config.num_layers if scorer is None else _bytes(scorer) / _bytes(target)
        self._shared = Shared(
            programs=programs,
            store=store,
            tokenizer=model.tokenizer,
            stop_ids=target.config.stop_ids,
            gate=Gate(pflash, cost),
            scope=pflash_scope,
            positions=positions,
            dflash=dflash,
            rule=rule,
            fixed_keep_ratio=keep_ratio,
            times=StepTimes(plain=0.03, blocks=dict.fromkeys(programs.block_rows, 0.03)),
        )
        self._drafter_accept_length = 0.0
        self._max_sessions = max_sessions
        self._runner: Runner | None = None
        self._start = threading.Lock()

    @staticmethod
    def load(
        path: str | Path | None = None,
        *,
        drafter: str | Path | None = None,
        scorer: str | Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Engine:
        """An engine for the model at `path`, or for the default model; `options` are those of the constructor.

        Raises CheckpointError, ConfigError or TokenizerError with a line that says what to do.
        """
        drafts = options.get("dflash") != "off"
        model = load_model(path, drafter=drafter, scorer=scorer, progress=progress, with_drafter=drafts)
        return Engine(model, **options)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles (or fetches from the cache) every program and measures the steps.

        Requests then never wait for that.
        """
        steps = self._shared.programs.warm_up_steps(with_scoring=self._scores)
        steps.append(("controller", self._warm_up_controller))
        for index, (label, action) in enumerate(steps):
            if progress:
                progress(label, index, len(steps))
            action()
        self._shared.times = self._shared.programs.measure_steps()
        if progress:
            progress("ready", len(steps), len(steps))

    def self_check(self) -> str | None:
        """Drafts a few canned answers and returns a warning if the drafter does not seem to belong to the target.

        Call it before requests come in. None also when there is no drafter or no tokenizer.
        """
        if not self._shared.programs.block_rows or self._tokenizer is None:
            return None
        mode, self._shared.dflash = self._shared.dflash, "on"
        try:
            answers = [self._canned_answer(text).stats.dflash for text in self_check.PROMPTS]
        finally:
            self._shared.dflash = mode
        drafted = [stats for stats in answers if stats is not None]
        steps = sum(stats.verify_steps for stats in drafted)
        self._drafter_accept_length = sum(stats.committed_tokens for stats in drafted) / steps if steps else 0.0
        return self_check.warning(self._drafter_accept_length)

    def _canned_answer(self, text: str) -> Result:
        prompt = text if self._template.source is None else [{"role": "user", "content": text}]
        return self.generate(prompt, max_tokens=min(self_check.TOKENS, self.context_length // 4), ignore_eos=True)

    def _warm_up_controller(self) -> None:
        observation = Observation(np.float32(1), np.int32(1), np.bool_(False), np.bool_(False))
        state = initial(self._shared.rule, self._shared.fixed_keep_ratio)
        for _ in range(2):  # the first state comes from the host, later ones from the device
            state = follow(self._shared.rule, state, observation)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Handle:
        """Queues a request. Events come from the device thread; `Finished` is the last and always comes.

        Raises RequestError for a request that cannot be served as it stands, OverloadedError when the queue is full.
        """
        prompt = self._prompt(request)
        end = self._tokenizer.decode(prompt.token_ids[-_END_TOKENS:], skip_special=False) if self._tokenizer else ""
        if request.answer_start and self._tokenizer:
            prompt = begin_answer(self._tokenizer, prompt, request.answer_start(end))
        room = self.context_length - len(prompt)
        if room < 1:
            raise RequestError(
                f"This model's maximum context length is {self.context_length} tokens, but the prompt has "
                f"{len(prompt)} tokens; at most {self.context_length - 1} leave room for an answer",
                code="context_length_exceeded",
                param="messages" if request.messages is not None else "prompt",
            )
        sampling = request.sampling
        sampling.check(self._shared.programs.vocabulary)
        job = Job(
            prompt=prompt,
            sampling=sampling,
            max_tokens=min(room, sampling.max_tokens or room),
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            session=request.session,
            on_event=on_event,
        )
        runner = self._running()
        runner.submit(job)
        return Handle(runner, job, end)

    def stream(self, prompt: str | Sequence[Mapping[str, Any]], **sampling: Any) -> Iterator[Event]:
        """The events of one request; leaving the iterator early cancels it. Arguments as `generate`."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        handle = self.submit(_request(prompt, sampling), events.put)
        try:
            while True:
                event = events.get()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            handle.cancel()

    def generate(self, prompt: str | Sequence[Mapping[str, Any]], **sampling: Any) -> Result:
        """One whole answer to a text or to chat messages. Keywords are the fields of `Sampling`, `tools` and `session`.

        Raises RuntimeError when the answer failed.
        """
        texts, ids, logprobs = [], [], []
        for event in self.stream(prompt, **sampling):
            if isinstance(event, TextDelta):
                texts.append(event.text)
                ids.extend(event.token_ids)
                logprobs.extend(event.logprobs)
            elif event.reason == "error":
                raise RuntimeError(event.error)
            else:
                return Result("".join(texts), tuple(ids), event.reason, event.stats, tuple(logprobs))
        raise RuntimeError("the answer ended without a last event")

    def count_tokens(self, prompt: str | Sequence[Mapping[str, Any]]) -> int:
        """How many tokens a text or chat messages are. Raises RequestError as `submit` does."""
        return len(self._prompt(_request(prompt, {})))

    def gauges(self) -> dict[str, float]:
        """What a metrics page shows of the engine at this moment."""
        pages = self._shared.store.pages
        runner = self._runner
        return {
            "queue_depth": float(runner.queue_depth if runner else 0),
            "active_sessions": float(runner.active if runner else 0),
            "pages_used": float(pages.used),
            "pages_total": float(pages.total),
            "read_again_tokens": float(self._shared.store.read_again),
            "compilations": float(compilations()),
            "drafter_self_check_accept_length": self._drafter_accept_length,
        }

    def close(self, drain: bool = False) -> None:
        """Stops the engine: running answers are finished (`drain`) or cancelled."""
        if self._runner is not None:
            self._runner.close(drain)

    def _running(self) -> Runner:
        with self._start:
            if self._runner is None:
                self._runner = Runner(self._shared, max_sessions=self._max_sessions)
            return self._runner

    def _prompt(self, request: Request) -> Prompt:
        if (request.messages is None) == (request.prompt is None):
            raise RequestError("exactly one of messages and prompt must be given", param="messages")
        if self._tokenizer is None:
            raise RequestError("this model was converted without a tokenizer, so it takes no text")
        if request.prompt is not None:
            prompt = text_prompt(self._tokenizer, request.prompt)
        else:
            prompt = build_prompt(
                self._tokenizer,
                self._template,
                request.messages or (),
                request.tools,
                variables=request.template_variables,
                continue_final=request.continue_final,
            )
        if len(prompt) == 0:
            raise RequestError("the prompt is empty", param="prompt")
        return prompt


def _request(prompt: str | Sequence[Mapping[str, Any]], options: dict[str, Any]) -> Request:
    session, tools = options.pop("session", None), options.pop("tools", None)
    if "stop" in options and isinstance(options["stop"], str):
        options["stop"] = (options["stop"],)
    text, messages = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    return Request(messages=messages, prompt=text, tools=tools, sampling=Sampling(**options), session=session)


def _context_length(asked: int | None, config: ModelConfig) -> int:
    if asked is not None and asked < 1:
        raise ValueError(f"context length {asked} is not a positive number")
    if asked is not None and asked > config.context_length:
        _warn(f"a context of {asked} tokens was asked for, the model has {config.context_length}: that is what it gets")
    return min(asked or config.context_length, config.context_length)


def _pages(context_length: int, profile: Profile) -> int:
    """Of a sequence with that many tokens."""
    return -(-(context_length + QUESTION_ROWS + profile.block_rows[-1]) // profile.page_size)


def _reserve(model: Model, context: int | None, sessions: int | None, *, drafts: bool, scores: bool) -> Reserved:
    """What was asked for, or as much of it as fits the device's memory."""
    config, profile, drafter = model.target.config, model.profile, model.drafter if drafts else None

    def pools(of: ModelConfig | DrafterConfig, tokens: int) -> int:
        pages = _pages(tokens, profile)
        ring = profile.ring(of, pages) if isinstance(of, ModelConfig) else None
        return kv_cost(of, ring, profile.dtype.itemsize).bytes_of(pages * profile.page_size)

    def bytes_of(tokens: int) -> int:
        return pools(config, tokens) + (pools(drafter.config, tokens) if drafter else 0)

    def beside(tokens: int) -> int:
        """Of a prompt that is being scored: its pages, the scorer's own pools, and the keys that scores are made of."""
        own = pools(model.scorer.config, tokens) if model.scorer else 0
        scorer = (model.scorer or model.target).config
        sizes = {"tokens": profile.scored_tokens(_pages(tokens, profile)), "dtype": profile.dtype}
        keys = jax.eval_shape(functools.partial(empty_keys, scorer, _depth(model), **sizes))
        return bytes_of(tokens) + own + sum(key.size * key.dtype.itemsize for key in keys)

    weights = weight_bytes(model.target, drafter, model.scorer)
    wanted = Reserved(_context_length(context, config), sessions or profile.max_sessions)
    lowered = {"sessions": sessions is None, "context": context is None}
    reserved = reserve(wanted, bytes_of, free_bytes(weights), beside=beside if scores else lambda tokens: 0, **lowered)
    if reserved != wanted:
        _warn(
            f"the device's memory holds {reserved.max_sessions} of {wanted.max_sessions} answers at a time with a "
            f"context of {reserved.context_length:,} of {wanted.context_length:,} tokens"
        )
    return reserved


def _depth(model: Model) -> Depth:
    """How far the scorer runs: the target itself, or a model of its own."""
    return early_exit(model.target.config) if model.scorer is None else full_depth(model.scorer.config)


def _warn(text: str) -> None:
    warnings.warn(text, EngineWarning, stacklevel=3)


def _bytes(model: Decoder) -> int:
    """Bytes of the layers' weights: what a pass costs, roughly, for models in the same format."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.layers))
