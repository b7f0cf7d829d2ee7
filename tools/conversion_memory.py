"""Peak memory of a conversion: a random bf16 folder with layers of a 31B model, converted to each format.

python tools/conversion_memory.py [--vocabulary 32768] [--layers 4] [--folder /tmp/conversion]
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 5376, 21504, 32, 16, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/conversion"))
    parser.add_argument("--convert", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source, out = arguments.folder / "source", arguments.folder / "out"
    if arguments.convert:
        return convert(source, out, arguments.convert)
    layer = write(source, arguments.vocabulary, arguments.layers)
    print(f"largest layer in f32: {layer / 1e9:.2f} GB; to stay below: {2 * layer / 1e9 + 1:.2f} GB")
    for weights in ("bf16", "w8", "w4"):
        command = [sys.executable, __file__, "--folder", str(arguments.folder), "--convert", weights]
        subprocess.run(command, check=True)
    shutil.rmtree(arguments.folder)
    return None


def convert(source: Path, out: Path, weights: str) -> None:
    import checkpoints

    started = time.monotonic()
    done = checkpoints.convert(source, out, weights=weights)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.monotonic() - started
    print(f"{weights}: peak {peak / 1e9:.2f} GB, {done.bytes / 1e9:.2f} GB written in {seconds:.0f} s")


def write(folder: Path, vocabulary: int, layers: int) -> int:
    """Writes the folder and returns the f32 bytes of a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    one = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "self_attn.q_norm": (HEAD_DIM,),
        "self_attn.k_norm": (HEAD_DIM,),
        "mlp.gate_proj": (WIDTH, HIDDEN),
        "mlp.up_proj": (WIDTH, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDTH),
    }
    shapes = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= {f"model.layers.{index}.{name}.weight": shape for index in range(layers) for name, shape in one.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    block = (np.random.default_rng(0).standard_normal(33_000_001, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for start in range(0, end, block.nbytes):
            file.write(block.tobytes()[: end - start])
    return 4 * sum(map(math.prod, one.values()))


if __name__ == "__main__":
    main()
