"""Goldens of the DFlash drafter, from z-lab's reference (PyPI `dflash`, MIT).

expected.npz holds a context that grows as in decoding. Step s reads `features_s` f32[tokens, features * dim] of newly
committed tokens, then drafts from `block_s` f32[block, dim] (embeddings of anchor and mask tokens) and gives `hidden_s`
f32[block, dim], after the final norm. The cache is the reference's own, cropped to the committed tokens after every
step.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from dflash.model import DFlash2DraftModel, DFlashDraftModel, GroupedDynamicCausalConv, _crop_to, _make_cache
from golden_models import randomise, write
from transformers import Qwen3Config

BLOCK, MASK_ID = 8, 95
NEW_TOKENS = (21, 5, 1, 8)
"""Committed tokens before each step: a prompt, some accepted, all rejected, all accepted."""
TARGET_LAYERS = (1, 3, 5)
DFLASH_2 = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 4, "selector_top_k": 4}


@torch.inference_mode()
def make(
    seed: int, layer_types: list[str], sliding_window: int | None, folder: Path, *, dflash_2: bool = False
) -> None:
    kind = DFlash2DraftModel if dflash_2 else DFlashDraftModel
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=len(layer_types),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rms_norm_eps=1e-2,
        tie_word_embeddings=False,
        layer_types=layer_types,
        use_sliding_window=sliding_window is not None,
        sliding_window=sliding_window,
        max_window_layers=len(layer_types),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        num_target_layers=8,
        block_size=BLOCK,
        dflash_config={
            "mask_token_id": MASK_ID,
            "target_layer_ids": list(TARGET_LAYERS),
            **(DFLASH_2 if dflash_2 else {}),
        },
        **({"is_causal": False} if dflash_2 else {}),
    )
    model = randomise(kind(config), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.modules():
        if isinstance(module, GroupedDynamicCausalConv):  # taps as large as what they correct
            module.base_kernel.uniform_(-1, 1, generator=generator)
    cache, start, expected = _make_cache(config), 0, {}
    for step, new_tokens in enumerate(NEW_TOKENS):
        features = torch.randn(1, new_tokens, len(TARGET_LAYERS) * config.hidden_size, generator=generator)
        block = torch.randn(1, BLOCK, config.hidden_size, generator=generator)
        start += new_tokens
        hidden = model(
            target_hidden=features,
            noise_embedding=block,
            position_ids=torch.arange(start - new_tokens, start + BLOCK)[None],
            past_key_values=cache,
            use_cache=True,
        )
        _crop_to(cache, start)
        arrays = {"features": features, "block": block, "hidden": hidden}
        expected |= {f"{name}_{step}": array[0].numpy() for name, array in arrays.items()}
    published = config.to_diff_dict() | {"architectures": [kind.__name__], "model_type": config.model_type}
    write(folder, model, published, rename=lambda name: name.replace("codebook.weight", "codebook"), **expected)


MAKERS = {
    "drafter_full": functools.partial(make, 60, ["full_attention"] * 2, None),
    "drafter_sliding": functools.partial(make, 70, ["sliding_attention", "full_attention"], 12),
    "drafter_convolution": functools.partial(make, 80, ["sliding_attention", "full_attention"], 12, dflash_2=True),
}
