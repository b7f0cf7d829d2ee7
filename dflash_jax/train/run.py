"""`dflash-jax train-drafter`: the target writes conversations, a drafter learns from them, and the result is a folder.

The folder has the drafter (config.json and safetensors in z-lab's layout), samples.npz (what it learnt from), log.jsonl
and `training/`, the state from which a run that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import checkpoints
from checkpoints.hf_writer import write_drafter
from dflash_jax.console import Note, Progress
from dflash_jax.engine.loading import Model, load_model
from dflash_jax.engine.request import RequestError
from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.parameters import drafter_parameters
from dflash_jax.train.learner import Learner, State, initial_parameters
from dflash_jax.train.openings import Rendered, joints, own_openings, plain_words, read_openings
from dflash_jax.train.recipe import Recipe
from dflash_jax.train.samples import LENGTHS, Batch, Samples
from dflash_jax.train.writing import Writer
from pallas_kernels.quantised_matmul.api import dequantise

_WARM_UP = 0.04
_LEAST_RATE = 0.02
"""What is left of the learning rate at the end, as a share of its peak."""
_HELD_OUT = 256
_LOG_STEPS = 50
_SAVE_SECONDS = 120
_PART_TOKENS = 1_000_000
"""Conversations are stored whenever so many tokens are written."""
_TARGET = Path("training") / "target.json"
"""Tells that a folder is a run's, and of what target."""


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is: by the clock, by steps, or both, whichever ends first."""

    seconds: float
    steps: int | None = None

    def done(self, seconds: float, steps: int) -> float:
        """The share of the run that is over, at most 1."""
        return min(1.0, max(seconds / self.seconds, steps / self.steps if self.steps else 0.0))


def run(
    model: Path | None,
    out: Path,
    *,
    recipe: Recipe,
    data: Path | None,
    samples: Sequence[Path],
    tokens: int,
    slots: int,
    room: int,
    length: Length,
    seed: int,
    start: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Trains a drafter into `out` and returns what came of it. A run that was stopped goes on where it was.

    `samples` are those of another run; without them the target writes `tokens` tokens of conversations first, from the
    prompts in `data` or from its own questions. `start` is a drafter to begin with instead of a random one.
    """
    if start is not None and start.resolve() == out.resolve():
        raise RequestError(f"--start {start} is the folder that is written: choose another one for the new drafter")
    _check_free(out)
    loaded = load_model(model, progress=progress, with_drafter=False)
    if loaded.tokenizer is None or loaded.template.source is None:
        raise RequestError("train-drafter needs a model with a tokenizer and a chat template")
    config = recipe.config_for(loaded.target.config, mask_id(loaded))
    parameters = _parameters(start, config) if start else None
    _claim(out, loaded.target.config)
    learnt_from = _samples(loaded, out, data, samples, tokens, slots, room, seed, progress)
    learner = Learner(loaded.target, config, recipe)
    first = learner.start(seed, parameters)
    report = _Run(learner, config, learnt_from, out, length, seed, progress).go(first)
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _check_free(out: Path) -> None:
    """Raises RequestError for a folder that holds anything but a run: what lies there would be lost."""
    if out.exists() and not (out / _TARGET).exists() and any(out.iterdir()):
        raise RequestError(f"{out} holds other files: choose a new folder")


def _claim(out: Path, target: ModelConfig) -> None:
    """Makes the folder a run's. Raises RequestError when it is that of another target."""
    facts = {"vocabulary": target.vocab_size, "hidden_size": target.hidden_size, "layers": target.num_layers}
    note = out / _TARGET
    if note.exists() and _read_json(note) != facts:
        raise RequestError(f"{out} has a run for another model: choose a new folder")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{file} is damaged: {error}; choose a new folder") from error


class _Run:
    """One training run in a folder."""

    def __init__(
        self,
        learner: Learner,
        config: DrafterConfig,
        samples: Samples,
        out: Path,
        length: Length,
        seed: int,
        progress: Progress,
    ) -> None:
        self._learner, self._config, self._out, self._length = learner, config, out, length
        held_out, self._samples = samples.split(min(_HELD_OUT, len(samples) // 10))
        self._held_out = held_out.cut(LENGTHS[0])
        self._batch_tokens = learner.recipe.batch_tokens * learner.devices
        self._seed, self._progress = seed, progress
        self._store = _Store(out / "training", dataclasses.asdict(learner.recipe))

    def go(self, state: State) -> dict[str, Any]:
        """Learns from `state`, or from where a run in this folder stopped, to the end; writes the drafter."""
        state, spent = self._store.read(state)
        key = jax.random.key(self._seed)
        first, seen, learning, saved = int(state.step), 0, 0.0, time.monotonic()
        done, waiting, shapes = self._length.done(spent, first), [], set()
        for step, batch in enumerate(self._batches(first), first):
            if done >= 1:
                break
            started = time.monotonic()
            rate = self._learner.recipe.rate * _schedule(done)
            state, figures = self._learner.learn(state, batch, jax.random.fold_in(key, step), rate)
            waiting.append(figures)
            fresh = batch.tokens.shape not in shapes
            jax.block_until_ready((figures if fresh else waiting[max(0, len(waiting) - 3)]).loss)
            seconds = time.monotonic() - started
            if fresh:  # compilation is not part of the time that a run has
                shapes.add(batch.tokens.shape)
                rows, length = batch.tokens.shape
                self._progress(Note(f"the first step of {rows} samples of {length} tokens took {seconds:.0f} s"), 0, 0)
            else:
                learning, seen = learning + seconds, seen + batch.tokens.size
            done = self._length.done(spent + learning, step + 1)
            if len(waiting) == _LOG_STEPS:
                self._log(step + 1, done, waiting, seen / max(learning, 1e-9))
                waiting = []
            if time.monotonic() - saved > _SAVE_SECONDS:
                self._store.write(state, spent + learning)
                saved = time.monotonic()
        spent += learning
        self._store.write(state, spent)
        parameters = {name: np.asarray(value) for name, value in state.parameters.items()}
        write_drafter(self._out, self._config, parameters)
        return {
            "recipe": dataclasses.asdict(self._learner.recipe),
            "samples": len(self._samples),
            "sample_tokens": len(self._samples.tokens),
            "steps": int(state.step),
            "seconds": round(spent, 1),
            "tokens_per_second": round(seen / max(learning, 1e-9)),
            "held_out_accept_length": self.evaluate(state),
        }

    def evaluate(self, state: State) -> float | None:
        """Mean tokens that a block would commit on samples that were held out; None when there are too few."""
        generator, committed, live = np.random.default_rng(0), 0, 0
        for number, batch in enumerate(self._held_out.batches(generator, self._batch_tokens, self._learner.devices)):
            sums = self._learner.evaluate(state.parameters, batch, jax.random.key(number))
            committed, live = committed + int(sums[0]), live + int(sums[1])
        return round(committed / live, 3) if live else None

    def _batches(self, step: int) -> Iterator[Batch]:
        epoch = 0
        while len(self._samples):
            generator = np.random.default_rng((self._seed, step, epoch))
            yield from self._samples.batches(generator, self._batch_tokens, self._learner.devices)
            epoch += 1

    def _log(self, step: int, done: float, waiting: list[Any], rate: float) -> None:
        figures = jax.device_get(waiting)
        line = {
            "step": step,
            "done": round(done, 4),
            "loss": round(float(np.mean([f.loss for f in figures])), 4),
            "accept_length": round(float(np.mean([f.accept_length for f in figures])), 3),
            "path_accept_length": round(float(np.mean([f.path_accept_length for f in figures])), 3),
            "tokens_per_second": round(rate),
        }
        with (self._out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        length = max(line["accept_length"], line["path_accept_length"])
        label = f"learning: loss {line['loss']:.3f}, accept length {length:.2f}, {rate / 1e3:.0f}k tokens/s"
        self._progress(label, round(1000 * done), 1000)


class _Store:
    """The state of a run on the disk: written beside the old one, which goes when the new one is whole."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self._folder, self._recipe = folder.resolve(), recipe
        self._note = self._folder / "run.json"

    def read(self, fresh: State) -> tuple[State, float]:
        """The stored state and the seconds that it took, or the fresh one when there is none.

        Raises RequestError when what is stored belongs to another recipe.
        """
        if not self._note.exists():
            return fresh, 0.0
        note = _read_json(self._note)
        theirs = {"convolution": False} | note["recipe"]  # runs of earlier versions had no choice
        shapes = ("layers", "features", "path_rank", "convolution", "optimiser")
        differs = [name for name in shapes if theirs.get(name) != self._recipe[name]]
        if differs:
            raise RequestError(
                f"{self._folder} has a run with {differs[0]} {theirs.get(differs[0])}, not "
                f"{self._recipe[differs[0]]}: choose another folder"
            )
        stored = ocp.StandardCheckpointer().restore(self._folder / note["state"], _fields(fresh))
        return State(**stored), note["seconds"]

    def write(self, state: State, seconds: float) -> None:
        name = f"step-{int(state.step)}-{time.time_ns()}"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self._folder / name, _fields(state))
        note = {"state": name, "seconds": seconds, "recipe": self._recipe}
        fresh = self._note.with_suffix(".new")
        fresh.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self._note)
        for old in self._folder.glob("step-*"):
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)


def _parameters(path: Path, config: DrafterConfig) -> dict[str, Any]:
    """The parameters of a drafter of the same shape, in f32. Raises CheckpointError or RequestError.

    One without a convolution gets what the recipe asks for: it starts as one that changes nothing. Quantised weights
    are trained on from what they stand for.
    """
    loaded = checkpoints.load(path)
    found = loaded.config
    if not isinstance(found, DrafterConfig):
        raise RequestError(f"{path} holds no drafter")
    if not found.convolution_group:
        found = dataclasses.replace(found, convolution_group=config.convolution_group)
    shape, theirs = (drafter_parameters(each) for each in (config, found))
    differs = next((name for name in {**shape, **theirs} if shape.get(name) != theirs.get(name)), None)
    if differs:
        raise RequestError(f"the drafter {path} has another shape than this recipe's: see {differs}")
    dense = {name: dequantise(value, shape[name].shape[-1]) for name, value in loaded.parameters.items()}
    return {**initial_parameters(config, seed=0), **dense}


def _samples(
    loaded: Model,
    out: Path,
    data: Path | None,
    given: Sequence[Path],
    tokens: int,
    slots: int,
    room: int,
    seed: int,
    progress: Progress,
) -> Samples:
    if given:
        return Samples.join([_load(file, loaded.target.config.vocab_size) for file in given])
    stored = out / "samples.npz"
    samples = _load(stored, loaded.target.config.vocab_size) if stored.exists() else Samples.of([])
    if len(samples):
        progress(Note(f"{len(samples):,} conversations, {len(samples.tokens):,} tokens, are there"), 0, 0)
    if len(samples.tokens) >= tokens:
        return samples
    assert loaded.tokenizer is not None
    room = min(room, loaded.target.config.context_length)
    # A run that goes on must not write the same again.
    seed += len(samples)
    openings = read_openings(data) if data is not None else own_openings(plain_words(loaded.tokenizer), seed)
    between = joints(loaded.template, loaded.tokenizer)
    writer = Writer(loaded.target, between, slots=slots, room=room, seed=seed)
    source = Rendered(openings, loaded.template, loaded.tokenizer, seed)
    while (have := len(samples.tokens)) < tokens:
        part = min(_PART_TOKENS, tokens - have)
        written = writer.write(
            source, tokens=part, progress=lambda done: progress("the target writes conversations", have + done, tokens)
        )
        samples = Samples.join([samples, written.samples])
        samples.save(stored)
        note = f"{len(samples.tokens):,} tokens, the last {part:,} at {written.tokens_per_second:,.0f} tokens/s"
        progress(Note(note), 0, 0)
        source.skipped += written.skipped
    if source.skipped:
        progress(Note(f"{source.skipped} prompts skipped"), 0, 0)
    return samples


def _load(file: Path, vocabulary: int) -> Samples:
    """Samples of an earlier run. Raises RequestError for a file of something else, or of another target."""
    try:
        samples = Samples.load(file)
    except ValueError as error:
        raise RequestError(str(error)) from error
    if not len(samples) or not 0 <= samples.tokens.min() <= samples.tokens.max() < vocabulary:
        raise RequestError(f"{file} has no samples of this model, whose vocabulary is {vocabulary}")
    return samples


def mask_id(model: Model) -> int:
    """The token that stands for what is to be proposed: one that texts never have.

    A mask token of the vocabulary, or else its last special token that neither template nor stops use.
    """
    tokenizer, config = model.tokenizer, model.target.config
    if tokenizer is None:
        raise RequestError("the model has no tokenizer")
    names = {id: tokenizer.token(id) or "" for id in sorted(tokenizer.special_ids) if id < config.vocab_size}
    for id, name in names.items():
        if name.strip("<>[]|").lower() == "mask":
            return id
    used = {*config.stop_ids, config.bos_id}
    unused = [id for id, name in names.items() if id not in used and name not in model.template.literals]
    if not unused:
        raise RequestError("the tokenizer has no special token to spare for the mask")
    return unused[-1]


def _schedule(done: float) -> float:
    """Share of the peak learning rate: a linear warm-up, then a cosine."""
    if done < _WARM_UP:
        return (done + 1e-3) / _WARM_UP
    left = 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))
    return _LEAST_RATE + (1 - _LEAST_RATE) * left


def _fields(state: State) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
