"""Whether DFlash changes a token: greedy answers with and without it, prompt by prompt, for drafters of every kind.

    python tools/check_equality.py [--model M] [--drafter D] [--weights bf16 --weights w4] [--prompts FILE ...] \
        [--number 200] [--tokens 256] [--rows 4 16 ...] [--drafters right random ...] [--json FILE]

`own` is the drafter that --drafter names or that the default model has, `random` one of random weights. The others know
the plain answer and propose it (`right`), with every fifth token wrong (`half right`), nothing but wrong tokens, stop
tokens, the mask token, or ids that the vocabulary does not have. The exit status is 1 if any token differs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import checkpoints
from checkpoints.random_models import random_drafter
from dflash_jax.bench.report import Prompt, environment, read_prompts, write
from dflash_jax.engine.engine import Engine
from dflash_jax.engine.loading import Model, load_model
from dflash_jax.engine.programs import put
from dflash_jax.engine.request import RequestError, Result
from dflash_jax.models.config import DrafterConfig
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.hf_config import default_target_layers
from dflash_jax.speculate import loop

SCRIPTED = ("right", "half right", "wrong", "stop tokens", "mask token", "beyond the vocabulary")
KINDS = ("own", "random", *SCRIPTED)
_BLOCK, _ROOM = 16, 64


class Script(nnx.Module):
    """In place of a drafter: proposes `script[n]` for token n of the answer. `propose_script` reads it."""

    def __init__(self, config: DrafterConfig, length: int) -> None:
        self.config = config
        self.script = nnx.Param(jnp.zeros(length, jnp.int32))

    def read(self, features: Any, pools: Sequence[Any], place: Any) -> tuple[Any, ...]:
        """Learns nothing."""
        return tuple(pools)


def propose_script(
    networks: Any, pools: Any, slots: Any, sampling: Any, *, rows: int, page_size: int
) -> tuple[jax.Array, Any]:
    """What `loop.propose` does for a `Script`; no head of a model is in the way of ids that do not exist."""
    numbers = slots.number[:, None] + jnp.arange(rows - 1, dtype=jnp.int32)[None, :]
    return jnp.take(networks.drafter.script.get_value(), numbers, mode="clip"), pools


def script_of(kind: str, answer: Sequence[int], model: Model, length: int) -> np.ndarray:
    """i32[length]: what a scripted drafter proposes when `answer` is what the target says."""
    vocabulary, stop_ids = model.target.config.vocab_size, model.target.config.stop_ids
    right = np.resize(np.asarray(answer, np.int32), length)
    wrong = (right + 1) % vocabulary
    return {
        "right": right,
        "half right": np.where(np.arange(length) % 5 == 3, wrong, right),
        "wrong": wrong,
        "stop tokens": np.resize(np.asarray(stop_ids or (0,), np.int32), length),
        "mask token": np.zeros(length, np.int32),
        "beyond the vocabulary": np.resize(np.asarray([vocabulary, 2**31 - 1, -1, -(2**31)], np.int32), length),
    }[kind].astype(np.int32)


def compare(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    tokens: int,
    kinds: Sequence[str],
    lengths: Sequence[tuple[int, ...]] = (),
    ignore_eos: bool = False,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """One row for each choice of verify lengths and kind of drafter; `options` are those of the engine, and `warm_up`.

    With several lengths the engine chooses among them as it does when it serves, if it has warmed up. Without `lengths`
    it has all that it offers on this device, and then each alone.
    """
    offered = model.profile.block_rows
    lengths = lengths or (offered, *((rows,) for rows in offered if len(offered) > 1))
    asked = {"max_tokens": tokens, "ignore_eos": ignore_eos}
    with _running(model, dflash="off", **options) as plain:
        answers, readable = [], []
        for prompt in prompts:
            with contextlib.suppress(RequestError):
                answers.append(plain.generate(prompt, **asked))
                readable.append(prompt)
        for rows in lengths:
            profile = dataclasses.replace(model.profile, block_rows=rows)
            offering = dataclasses.replace(model, profile=profile)
            for kind, results in _drafted(offering, kinds, readable, answers, asked, options):
                tree = 0 if kind in SCRIPTED else profile.with_tree(options.get("tree")).tree_rows
                yield {
                    "drafter": kind,
                    "verify_rows": rows,
                    "tree": tree,
                    **_row(plain, readable, answers, results, asked),
                }


def _drafted(
    model: Model,
    kinds: Sequence[str],
    prompts: Sequence[Prompt],
    answers: Sequence[Result],
    asked: dict[str, Any],
    options: dict[str, Any],
) -> Iterator[tuple[str, list[Result]]]:
    for kind in [kind for kind in kinds if kind not in SCRIPTED]:
        drafter = model.drafter if kind == "own" and model.drafter else _random(model)
        with _running(dataclasses.replace(model, drafter=drafter), dflash="on", **options) as engine:
            yield kind, [engine.generate(prompt, **asked) for prompt in prompts]
    options = {**options, "tree": 0}  # a script has one path
    scripted = [kind for kind in kinds if kind in SCRIPTED]
    if not scripted:
        return
    length = asked["max_tokens"] + _ROOM
    drafter: Any = Script(_config(model), length)
    with (
        mock.patch.object(loop, "propose", propose_script),
        _running(dataclasses.replace(model, drafter=drafter), dflash="on", **options) as engine,
    ):
        for kind in scripted:
            results = []
            engine._shared.store.forget_all()  # prompts that are read in other chunks have other bits
            for prompt, answer in zip(prompts, answers, strict=True):
                script = script_of(kind, answer.token_ids, model, length)
                engine._shared.programs._weights[1].leaves = (put(script),)
                results.append(engine.generate(prompt, **asked))
            yield kind, results


def _row(
    plain: Engine,
    prompts: Sequence[Prompt],
    answers: Sequence[Result],
    results: Sequence[Result],
    asked: dict[str, Any],
) -> dict[str, Any]:
    different = [
        _difference(plain, prompts[index], index, answer, result, asked)
        for index, (answer, result) in enumerate(zip(answers, results, strict=True))
        if answer.token_ids != result.token_ids or answer.finish_reason != result.finish_reason
    ]
    drafted = [result.stats.dflash for result in results if result.stats.dflash]
    steps = sum(stats.verify_steps for stats in drafted)
    return {
        "prompts": len(results),
        "new_tokens": sum(len(result.token_ids) for result in results),
        "equal_prompts": len(results) - len(different),
        "equal_tokens": not different,
        "accept_length": round(sum(stats.committed_tokens for stats in drafted) / steps, 3) if steps else None,
        "different": different,
    }


def _difference(
    plain: Engine, prompt: Prompt, index: int, answer: Result, result: Result, asked: dict[str, Any]
) -> dict[str, Any]:
    """Where two answers part, and how near the plain one's two best tokens were to each other there."""
    pairs = itertools.zip_longest(answer.token_ids, result.token_ids)
    place = next((n for n, (one, other) in enumerate(pairs) if one != other), len(answer.token_ids))
    with_logprobs = plain.generate(prompt, **asked, logprobs=2).logprobs
    gap = None
    if place < len(with_logprobs):
        best, second = with_logprobs[place].top
        gap = round(best.logprob - second.logprob, 5)
    return {
        "prompt": index,
        "token": place,
        "plain": list(answer.token_ids[place : place + 1]),
        "dflash": list(result.token_ids[place : place + 1]),
        "finish_reasons": [answer.finish_reason, result.finish_reason],
        "logprob_gap": gap,
    }


@contextlib.contextmanager
def _running(model: Model, *, warm_up: bool = True, **options: Any) -> Iterator[Engine]:
    with contextlib.closing(Engine(model, pflash="off", max_sessions=1, **options)) as engine:
        if warm_up:
            engine.warm_up()
        yield engine


def _config(model: Model) -> DrafterConfig:
    target = model.target.config
    layers = default_target_layers(target.num_layers, 1)
    return DrafterConfig.beside(target, block_size=_BLOCK, mask_id=0, target_layers=layers, windows=(None, None))


def _random(model: Model) -> Drafter:
    config = _config(model)
    parameters = {name: value.astype(model.profile.dtype) for name, value in random_drafter(config).items()}
    return Drafter(config, parameters, dtype=model.profile.dtype)


def _models(model: Path | None, weights: Sequence[str], drafter: Path | None) -> Iterator[tuple[str, Model]]:
    """The model in each of the formats: converted for this run, or the default model's own conversions."""
    if not weights:
        yield "as stored", load_model(model or checkpoints.default_model(), drafter=drafter)
    for name in weights:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{model.stem}-{name}" if model else checkpoints.default_model(weights=name)
            if model:
                checkpoints.convert(model, path, weights=name)
            yield name, load_model(path, drafter=drafter)


def _prompts(files: Iterable[Path], number: int) -> list[Prompt]:
    """As many prompts, taken from the files in turn."""
    sets = [read_prompts(file) for file in files] or [read_prompts(None)]
    taken = (prompt for row in itertools.zip_longest(*sets) for prompt in row if prompt is not None)
    return list(itertools.islice(taken, number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the default model if there is none")
    parser.add_argument("--drafter", type=Path, help="the default model's own if neither is named")
    parser.add_argument("--weights", action="append", choices=("f32", "bf16", "w8", "w4"), default=[])
    parser.add_argument("--prompts", type=Path, nargs="+", default=[])
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="verify lengths, each alone; else the device's")
    parser.add_argument("--drafters", nargs="+", choices=KINDS, help="all of them if there are none")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--tree", type=int, help="rows of a tree, 0 for chains; the device's if it is not there")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    drafter = arguments.drafter or (None if arguments.model else checkpoints.default_drafter())
    kinds = arguments.drafters or [kind for kind in KINDS if kind != "own" or drafter]
    if "own" in kinds and drafter is None:
        parser.error("the drafter `own` needs --drafter")
    prompts = _prompts(arguments.prompts, arguments.number)
    rows, report = [], {**environment(), "command": " ".join(["python", *sys.argv])}
    for weights, model in _models(arguments.model, arguments.weights, drafter):
        for row in compare(
            model,
            prompts,
            tokens=arguments.tokens,
            kinds=kinds,
            lengths=[(rows,) for rows in arguments.rows],
            ignore_eos=arguments.ignore_eos,
            tree=arguments.tree,
        ):
            rows.append({"weights": weights, **row})
            print(json.dumps(rows[-1]), flush=True)
            write(arguments.json, {**report, "model": model.model_id, "rows": rows})
    if not all(row["equal_tokens"] for row in rows):
        sys.exit("tokens differ")


if __name__ == "__main__":
    main()
