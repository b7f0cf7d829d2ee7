"""The normalised record that describes every target family to one decoder.

A family differs from another only in data: per-layer numbers (`LayerConfig`) and a few switches of the whole model
(`ModelConfig`). hf_config.py makes these records from the `config.json` spellings that are found in practice.
"""

from __future__ import annotations

import dataclasses
import json
import math


class ConfigError(ValueError):
    """A model description that this engine cannot serve; the message says what was found and what is supported."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one layer, half-split pairs (d, d + head_dim / 2).

    `rotated_pairs` of the `head_dim / 2` pairs turn (all of them when None); the others have frequency zero, as in
    Gemma 4's "proportional" RoPE. `linear_factor` divides the frequencies; the llama3 fields blend them by wavelength.
    """

    theta: float = 10_000.0
    rotated_pairs: int | None = None
    linear_factor: float = 1.0
    llama3_factor: float | None = None
    llama3_low_freq_factor: float = 1.0
    llama3_high_freq_factor: float = 4.0
    llama3_original_context: int = 8192

    def inverse_frequencies(self, head_dim: int) -> list[float]:
        """Angular step per position for each of the `head_dim / 2` pairs."""
        half = head_dim // 2
        live = half if self.rotated_pairs is None else self.rotated_pairs
        plain = [self.theta ** (-2.0 * pair / head_dim) / self.linear_factor for pair in range(live)]
        return [self._llama3(step) for step in plain] + [0.0] * (half - live)

    def _llama3(self, step: float) -> float:
        if self.llama3_factor is None:
            return step
        wavelength = 2 * math.pi / step
        low = self.llama3_original_context / self.llama3_low_freq_factor
        high = self.llama3_original_context / self.llama3_high_freq_factor
        if wavelength > low:
            return step / self.llama3_factor
        if wavelength < high:
            return step
        blend = (self.llama3_original_context / wavelength - self.llama3_low_freq_factor) / (
            self.llama3_high_freq_factor - self.llama3_low_freq_factor
        )
        return (1 - blend) * step / self.llama3_factor + blend * step


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What one decoder layer needs to know about itself."""

    head_dim: int
    num_kv_heads: int
    mlp_width: int
    attention_scale: float
    rope: RopeConfig
    window: int | None = None
    """Keys that a query may see, itself included; None is full attention."""
    values_are_keys: bool = False
    """One projection serves both: V is what K is before its norm and RoPE (Gemma 4's full layers)."""
    kv_source: int | None = None
    """The layer whose K and V this one reads; it has none of its own then. Such layers come last (Gemma 4 E2B, E4B)."""


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Mixture of experts beside the dense MLP of every layer (Gemma 4 26B-A4B): `active` of `count` experts a token."""

    count: int
    active: int
    width: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One target (or scorer) model, whatever its family."""

    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    context_length: int
    tied_embeddings: bool
    stop_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    activation: str = "silu"
    """`silu` or `gelu_tanh`, of the gated MLP."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k before RoPE (Qwen3, Gemma)."""
    v_norm: bool = False
    """RMSNorm without weight over each head of v (Gemma 4)."""
    sandwich_norms: bool = False
    """A second norm on each sublayer's output before the residual add (Gemma)."""
    norm_offset: float = 0.0
    """Added to every stored norm weight: 1 for Gemma 3's `(1 + w)`."""
    embedding_scale: float = 1.0
    final_softcap: float | None = None
    attention_bias: bool = False
    """Bias on q, k and v (Qwen2)."""
    output_bias: bool = False
    """Bias on o."""
    layer_scalar: bool = False
    """Each layer ends with a multiplication of the residual stream by one number (Gemma 4)."""
    experts: ExpertsConfig | None = None
    per_layer_width: int = 0
    """Numbers per layer that a token's per-layer embedding has (Gemma 4 E2B and E4B); 0 without one."""
    per_layer_vocab: int = 0
    suppressed_ids: tuple[int, ...] = ()
    """Tokens that are never generated."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def own_layers(self) -> tuple[LayerConfig, ...]:
        """The layers with K and V of their own: the first ones."""
        return tuple(layer for layer in self.layers if layer.kv_source is None)

    def key_width(self, layer: LayerConfig) -> int:
        """Numbers per head and token in the key pool of a layer: `head_dim`, or the compact form's fewer.

        Where K is what V is, but for a norm's weight and RoPE, and RoPE turns some dims only, the others follow from V.
        """
        pairs = layer.rope.rotated_pairs
        follows = layer.values_are_keys and self.v_norm and self.qk_norm and len(self.own_layers) == self.num_layers
        return 2 * pairs if follows and pairs is not None else layer.head_dim

    def kv_numbers(self, layer: LayerConfig) -> int:
        """Numbers per token in the K and V of a layer."""
        return layer.num_kv_heads * (self.key_width(layer) + layer.head_dim)

    def to_json(self) -> str:
        """The record as written to a converted folder."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Reads what `to_json` wrote; raises ConfigError when fields are missing or unknown."""
        try:
            fields = json.loads(text)
            layers = tuple(
                LayerConfig(**{**layer, "rope": RopeConfig(**layer["rope"])}) for layer in fields.pop("layers")
            )
            experts = fields.pop("experts", None)
            for name in ("stop_ids", "suppressed_ids"):
                fields[name] = tuple(fields.get(name, ()))
            return cls(layers=layers, experts=ExpertsConfig(**experts) if experts else None, **fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"config.json is not a dflash-jax model record: {error}; convert the model again"
            ) from error


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """A DFlash drafter: a Qwen3-shaped decoder over a block of rows that reads the target's features.

    It owns no embedding and no lm_head: both are the target's. `windows` has one entry per layer (None is full
    attention); `causal` says per layer whether the rows of a block see only rows before them.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    rope: RopeConfig
    block_size: int
    mask_id: int
    target_layers: tuple[int, ...]
    """0-based; the feature of layer i is the residual stream after it."""
    windows: tuple[int | None, ...]
    causal: tuple[bool, ...]
    num_target_layers: int | None
    """None where the source does not say."""
    vocab_size: int
    path_rank: int = 0
    """Rank of the path selector; 0 is a drafter without one (DFlash 1)."""
    convolution_group: int = 0
    """Channels that share the corrections of the two-tap convolution; 0 is a drafter without one."""

    def __post_init__(self) -> None:
        if self.convolution_group and self.hidden_size % self.convolution_group:
            raise ConfigError(
                f"a convolution in groups of {self.convolution_group} channels does not fit a width of "
                f"{self.hidden_size}: it has to be a multiple"
            )

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @classmethod
    def beside(
        cls,
        target: ModelConfig,
        *,
        block_size: int,
        mask_id: int,
        target_layers: tuple[int, ...],
        windows: tuple[int | None, ...],
        path_rank: int = 0,
        convolution_group: int = 0,
    ) -> DrafterConfig:
        """A drafter as wide as its target, with layers shaped like the target's first that see a block both ways."""
        layer = target.layers[0]
        return cls(
            hidden_size=target.hidden_size,
            num_heads=target.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            mlp_width=layer.mlp_width,
            norm_eps=target.norm_eps,
            rope=dataclasses.replace(layer.rope, rotated_pairs=None),
            block_size=block_size,
            mask_id=mask_id,
            target_layers=target_layers,
            windows=windows,
            causal=(False,) * len(windows),
            num_target_layers=target.num_layers,
            vocab_size=target.vocab_size,
            path_rank=path_rank,
            convolution_group=convolution_group,
        )

    def to_json(self) -> str:
        """The record as written to a converted folder."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> DrafterConfig:
        """Reads what `to_json` wrote; raises ConfigError when fields are missing or unknown."""
        try:
            fields = json.loads(text)
            fields["rope"] = RopeConfig(**fields["rope"])
            for name in ("target_layers", "windows", "causal"):
                fields[name] = tuple(fields[name])
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"config.json is not a dflash-jax drafter record: {error}; convert it again") from error
