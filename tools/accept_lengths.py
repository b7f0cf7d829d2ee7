"""Accept lengths of chains and trees of several sizes, on the same answers of the default model.

    python tools/accept_lengths.py --prompts FILE [--prompts FILE ...] [--number 6] [--tokens 112] [--temperature T]

Answers every prompt, drafts at every token of the answer, and counts what a chain of 16 rows and trees of 16 and 32
rows would have committed from there. Proposals never change tokens, so one answer serves them all, on any device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dflash_jax.bench.report import Prompt, read_prompts
from dflash_jax.engine.chat import build_prompt, text_prompt
from dflash_jax.engine.engine import Engine
from dflash_jax.engine.loading import Model, load_model
from dflash_jax.engine.programs import chunks_of, sampling_parameters
from dflash_jax.models.decoder import Place, empty_pools
from dflash_jax.models.drafter import block_tokens, empty_drafter_pools
from dflash_jax.speculate.loop import prefill
from dflash_jax.speculate.path import choose_path
from dflash_jax.speculate.sampling import SamplingParameters
from dflash_jax.speculate.step import Networks, Pools
from dflash_jax.speculate.tree import choose_tree

_TREES = (16, 32)
_CHAIN_ROWS, _CONTEXT = 16, 4096
Children = list[dict[int, int]]
"""By row: the row of each child, by its token."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, action="append", required=True)
    parser.add_argument("--number", type=int, default=6, help="prompts of each file, spread over it")
    parser.add_argument("--tokens", type=int, default=112)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    model = load_model()
    engine = Engine(model, dflash="on", pflash="off", max_sessions=1, context_length=_CONTEXT)
    draft = _drafts(model)
    for file in arguments.prompts:
        chats = read_prompts(file)
        answers = []
        for seed, chat in enumerate(chats[:: max(1, len(chats) // arguments.number)][: arguments.number]):
            options: dict[str, Any] = {"temperature": arguments.temperature, "seed": seed}
            ids = engine.generate(chat, max_tokens=arguments.tokens, **options).token_ids
            prompt = np.asarray(_prompt(model, chat), np.int32)
            answers.append((ids, list(draft(prompt, np.asarray(ids, np.int32), sampling_parameters(**options)))))
        names = ("chain", *(f"tree of {rows}" for rows in _TREES))
        found = {
            name: _accept_length([(ids, [row[n] for row in rows]) for ids, rows in answers])
            for n, name in enumerate(names)
        }
        print(file.stem, ", ".join(f"{name} {length:.3f}" for name, length in found.items()), flush=True)
    engine.close()


def _prompt(model: Model, chat: Prompt) -> tuple[int, ...]:
    assert model.tokenizer is not None
    if isinstance(chat, str):
        return tuple(text_prompt(model.tokenizer, chat).token_ids)
    return tuple(build_prompt(model.tokenizer, model.template, chat, None).token_ids)


def _drafts(model: Model) -> Callable[..., Iterator[tuple[Children, ...]]]:
    """A function (prompt, answer, sampling) -> what is proposed before each token: a chain, then the trees."""
    drafter = model.drafter
    assert drafter is not None
    profile, config = model.profile, drafter.config
    pages = -(-(_CONTEXT + _CHAIN_ROWS) // profile.page_size)
    table = jnp.arange(1, pages + 1, dtype=jnp.int32)[None]
    graph, state = nnx.split((model.target, drafter))
    sizes = {"num_pages": pages + 1, "page_size": profile.page_size, "dtype": profile.dtype}

    @jax.jit
    def read(state: Any, pools: Pools, tokens: jax.Array, positions: jax.Array, start: jax.Array) -> Pools:
        networks = Networks(*nnx.merge(graph, state))
        return prefill(networks, pools, tokens, positions, table, start, page_size=profile.page_size)

    @jax.jit
    def propose(
        state: Any, pools: Pools, start: jax.Array, anchor: jax.Array, sampling: SamplingParameters, number: jax.Array
    ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        target, drafter = nnx.merge(graph, state)
        positions = start[:, None] + jnp.arange(_CHAIN_ROWS, dtype=jnp.int32)[None, :]
        block = block_tokens(anchor, config, _CHAIN_ROWS)
        hidden, _ = drafter(target.embed(block), pools.drafter, Place(table, start, positions, profile.page_size))
        known = (target, drafter.path, hidden[:, 1:], anchor, sampling, number)
        trees = [choose_tree(*known, rows=rows) for rows in _TREES]
        return choose_path(*known)[0], [(tree.tokens[0], tree.parents[0]) for tree in trees]

    def drafts(prompt: np.ndarray, answer: np.ndarray, sampling: SamplingParameters) -> Iterator[tuple[Children, ...]]:
        whole = np.concatenate([prompt, answer])
        pools = Pools(empty_pools(model.target.config, **sizes), empty_drafter_pools(config, **sizes))
        for start, end in chunks_of(len(whole), profile):
            missing = (0, profile.chunk_for(end - start) - (end - start))
            rows = (np.pad(each[start:end], missing)[None] for each in (whole, np.arange(len(whole), dtype=np.int32)))
            pools = read(state, pools, *rows, np.asarray([start], np.int32))
        for number in range(len(answer)):
            start = len(prompt) - 1 + number
            scalars = (np.asarray([each], np.int32) for each in (start, whole[start]))
            chain, trees = jax.device_get(propose(state, pools, *scalars, sampling, np.asarray([number], np.int32)))
            of_chain: Children = [{int(token): row + 1} for row, token in enumerate(chain)]
            yield ([*of_chain, {}], *(_children(*tree) for tree in trees))

    return drafts


def _children(tokens: np.ndarray, parents: np.ndarray) -> Children:
    found: Children = [{} for _ in tokens]
    for row in range(1, len(tokens)):
        found[int(parents[row])][int(tokens[row])] = row
    return found


def _accept_length(answers: Sequence[tuple[Sequence[int], Sequence[Children]]]) -> float:
    tokens = steps = 0
    for answer, proposals in answers:
        done = 0
        while done < len(answer):
            committed = _committed(answer[done:], proposals[done])
            done, tokens, steps = done + committed, tokens + committed, steps + 1
    return tokens / steps


def _committed(answer: Sequence[int], proposals: Children) -> int:
    """Proposals along the answer, and one token of the target's own, as far as the answer goes."""
    row = 0
    for accepted, token in enumerate(answer):
        if token not in proposals[row]:
            return accepted + 1
        row = proposals[row][token]
    return len(answer)


if __name__ == "__main__":
    main()
