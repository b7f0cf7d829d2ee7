"""Converts the tiny models of tests/goldens with llama.cpp's own scripts and reads the files.

    .venv-goldens/bin/python tools/check_gguf_conversion.py vendor/llama.cpp

The folder is in the source package of PyPI's llama-cpp-python. Printed: the largest difference to transformers' logits,
and for the drafter whether config and weights are those of its folder. Gemma 3 is not among them: its files do not say
which layers slide, and the tiny models have another pattern than real ones.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
MODELS = (
    *("llama_tied", "llama_rope_scaled", "qwen2", "qwen3", "qwen3_tied"),
    *("gemma4", "gemma4_experts", "gemma4_per_layer"),
)
DRAFTERS = ("drafter_full", "drafter_sliding")
_ARCHITECTURES = {"gemma4": "Gemma4ForConditionalGeneration"}
"""Of configs that lack the field."""


def main() -> None:
    """One line for every model."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    vendor = Path(sys.argv[1]).resolve()
    sys.path[:0] = [str(vendor / "gguf-py"), str(vendor)]
    import checkpoints  # with the gguf package of the folder
    import dflash_jax

    with tempfile.TemporaryDirectory() as temporary:
        for name in MODELS:
            file = _convert(name, Path(temporary))
            with np.load(GOLDENS / name / "expected.npz") as expected:
                found = np.asarray(dflash_jax.load_target(file).logits(expected["input_ids"]))
                print(f"{name:20} largest difference {np.abs(found - expected['logits']).max():.1e}")
        for name in DRAFTERS:
            found, expected = checkpoints.load(_convert(name, Path(temporary))), checkpoints.load(GOLDENS / name)
            names = [
                name
                for name, values in expected.parameters.items()
                if not np.array_equal(np.asarray(values), np.asarray(found.parameters[name]))
            ]
            print(f"{name:20} {found.config}\n{'in its folder':20} {expected.config}\ndiffering tensors: {names}")


def _convert(name: str, temporary: Path) -> Path:
    conversion, base = importlib.import_module("conversion"), importlib.import_module("conversion.base")
    gguf = importlib.import_module("gguf")
    folder, file = temporary / name, temporary / f"{name}.gguf"
    shutil.copytree(GOLDENS / name, folder)
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described.setdefault("architectures", [_ARCHITECTURES.get(described["model_type"])])
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    vocabulary = {str(id): id for id in range({**described, **described.get("text_config", {})}["vocab_size"])}
    tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": []}  # Gemma's script counts its ids
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    fields = base.ModelBase.load_hparams(folder, False)
    kind = conversion.get_model_class(base.get_model_architecture(fields, base.ModelType.TEXT))
    model = kind(folder, gguf.LlamaFileType.ALL_F32, file, hparams=fields)
    model.set_vocab = types.MethodType(_tokens, model)
    model.write()
    return file


def _tokens(model: Any) -> None:
    """Of the tiny models; they have no tokenizer."""
    if mask := model.hparams.get("dflash_config", {}).get("mask_token_id"):
        model.gguf_writer.add_token_list([f"t{index}" for index in range(model.hparams["vocab_size"])])
        model.gguf_writer.add_mask_token_id(mask)


if __name__ == "__main__":
    main()
