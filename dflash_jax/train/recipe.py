"""What a training run is told: the drafter's shape, and how it learns."""

from __future__ import annotations

import dataclasses

from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.hf_config import default_target_layers
from dflash_jax.train.loss import Labels, Weighting

_CONVOLUTION_GROUP = 16
"""That of DFlash 2."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Defaults are what served the default model best (docs/training.md has the table).

    layers, features       draft layers, and target layers that they read
    block_size             rows of a block, anchor included
    window                 context tokens that the draft layers see
    path_rank, path_share  rank of the path selector, 0 for none, and the share of blocks that are corrected by it
    convolution            whether rows see their left neighbours through the two-tap convolution
    weighting, decay       of slots in the loss (train/loss.py)
    labels                 what a slot learns: the token that follows, or the target's distribution of it
    optimiser, rate        Muon for matrices and AdamW for the rest, or AdamW for all; the peak learning rate
    batch_tokens           tokens of a step on each device
    tokens_per_anchor      one random anchor for so many tokens of a sample
    """

    layers: int = 4
    features: int = 5
    block_size: int = 16
    window: int = 1024
    path_rank: int = 128
    path_share: float = 0.75
    convolution: bool = False
    weighting: Weighting = "d-pace"
    decay: float = 7.0
    labels: Labels = "tokens"
    optimiser: str = "muon"
    rate: float = 1e-3
    batch_tokens: int = 16_384
    tokens_per_anchor: int = 8

    def config_for(self, target: ModelConfig, mask_id: int) -> DrafterConfig:
        """The drafter of this recipe for a target: as wide as the target, shaped like its first layer."""
        return DrafterConfig.beside(
            target,
            block_size=self.block_size,
            mask_id=mask_id,
            target_layers=default_target_layers(target.num_layers, self.features),
            windows=(self.window,) * self.layers,
            path_rank=self.path_rank,
            convolution_group=_CONVOLUTION_GROUP if self.convolution else 0,
        )
