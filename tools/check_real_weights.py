"""Compares a GGUF file with real weights with transformers, and its weights formats with each other.

    .venv-goldens/bin/python tools/check_real_weights.py MODEL.gguf TEXT.txt

transformers dequantises the same file by itself (its own table of names, its own permutation). Printed: perplexity of
the first 3,000 characters and the greedy continuation of a few words, by transformers and by f32, w8 and w4 here. Needs
the environment of `make goldens` and the package accelerate. The figures are in docs/families.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers

import checkpoints
from checkpoints.gguf_source import read_gguf
from dflash_jax.engine.target import Target
from dflash_jax.models.config import ModelConfig
from dflash_jax.models.decoder import Decoder

_CHARACTERS, _NEW_TOKENS, _LENGTH = 3_000, 32, 64
_FORMATS = ("f32", "w8", "w4")
Logits = Callable[[np.ndarray], np.ndarray]
"""Logits [tokens, vocab] of token ids [tokens]."""


def main() -> None:
    """Prints one line for every implementation."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("--prompt", default="The capital of France is")
    given = arguments.parse_args()
    source = read_gguf(given.model)
    if source.tokenizer_json is None:
        raise SystemExit(f"{given.model} holds no tokenizer")
    tokenizer = tokenizers.Tokenizer.from_str(source.tokenizer_json)
    text = given.text.read_text(encoding="utf-8")[:_CHARACTERS]
    ids, prompt = (np.array(tokenizer.encode(each).ids) for each in (text, given.prompt))
    print(f"{given.model.name}: {len(ids)} tokens of {given.text.name}, prompt {given.prompt!r}")
    best = None
    for label, logits in [("transformers f32", _transformers(given.model)), *((name, None) for name in _FORMATS)]:
        logits = logits or _ours(given.model, label)
        found, continuation = logits(ids), _greedy(logits, prompt)
        top = found.argmax(axis=1)
        best = top if best is None else best
        agrees = (top == best).mean()
        print(f"{label:18} perplexity {_perplexity(found, ids):.4f}  top-1 agrees {agrees:7.2%}  {continuation[:8]} "
              f"{tokenizer.decode(continuation)!r}", flush=True)  # fmt: skip


def _transformers(model: Path) -> Logits:
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32, attn_implementation="eager"
    )

    @torch.inference_mode()
    def logits(ids: np.ndarray) -> np.ndarray:
        return network(torch.tensor(ids)[None]).logits[0].float().numpy()

    return logits


def _ours(model: Path, weights: str) -> Logits:
    loaded = checkpoints.load(model, weights=weights)
    if not isinstance(loaded.config, ModelConfig):
        raise SystemExit(f"{model} is no target")
    target = Target(Decoder(loaded.config, loaded.parameters, dtype=jnp.float32))
    return lambda ids: np.asarray(target.logits(ids[None])[0])


def _perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    losses = []
    for row, following in zip(logits[:-1], ids[1:], strict=True):
        wide = row.astype(np.float64)
        largest = wide.max()
        losses.append(largest + np.log(np.exp(wide - largest).sum()) - wide[following])
    return float(np.exp(np.mean(losses)))


def _greedy(logits: Logits, prompt: np.ndarray) -> list[int]:
    """Whole sequences of one length every time, because rows see nothing of what comes after them."""
    ids = np.zeros(_LENGTH, np.int64)
    ids[: len(prompt)] = prompt
    for place in range(len(prompt), len(prompt) + _NEW_TOKENS):
        ids[place] = int(logits(ids)[place - 1].argmax())
    return ids[len(prompt) : len(prompt) + _NEW_TOKENS].tolist()


if __name__ == "__main__":
    main()
