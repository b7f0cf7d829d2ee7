"""The normalised record that describes every target family to one decoder.

A family differs from another only in data: per-layer numbers (`LayerConfig`) and a few switches of the whole model
(`ModelConfig`). `from_hf` reads the `config.json` spellings that are found in practice and refuses what it does not
know.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

FAMILIES = ("llama", "qwen3")
"""Families whose numbers are tested against a reference implementation."""

_MISTRAL_WINDOW = 4096
"""What transformers takes for a Mistral config without the field; one with null has full attention."""


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
    """What one decoder layer needs to know about itself.

    `window` is the number of keys that a query may see, itself included; None is full attention.
    """

    head_dim: int
    num_kv_heads: int
    mlp_width: int
    attention_scale: float
    rope: RopeConfig
    window: int | None = None


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
    """Bias on q, k and v, not on o."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

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
            stop_ids = tuple(fields.pop("stop_ids"))
            return cls(layers=layers, stop_ids=stop_ids, **fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"config.json is not a dflash-jax model record: {error}; convert the model again"
            ) from error


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Normalises a Hugging Face `config.json`.

    Raises ConfigError for a family that is not supported or a field with a value that the decoder does not know.
    """
    family = {"llama": "llama", "mistral": "llama", "qwen3": "qwen3"}.get(str(config.get("model_type")))
    if family is None:
        raise ConfigError(
            f"model family {config.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    where = f"config.json of family {family}"
    hidden, heads = _count(config, "hidden_size", where), _count(config, "num_attention_heads", where)
    num_layers, width = _count(config, "num_hidden_layers", where), _count(config, "intermediate_size", where)
    vocab_size = _count(config, "vocab_size", where)
    head_dim = _optional_count(config, "head_dim", where, hidden // heads)
    layer = LayerConfig(
        head_dim=head_dim,
        num_kv_heads=_optional_count(config, "num_key_value_heads", where, heads),
        mlp_width=width,
        attention_scale=head_dim**-0.5,
        rope=_rope(config),
    )
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {config['hidden_act']!r} is not supported for family {family}; supported: silu")
    if config.get("mlp_bias"):
        raise ConfigError("mlp_bias true is not supported")
    if config.get("attention_bias"):
        # In these families it means a bias on the output projection too, which the decoder does not have.
        raise ConfigError(f"attention_bias true is not supported for family {family}; supported: false")
    if config["model_type"] == "mistral":
        window = config.get("sliding_window", _MISTRAL_WINDOW)
        layer = dataclasses.replace(layer, window=int(window) if window else None)
    elif family != "llama" and config.get("use_sliding_window") and config.get("sliding_window"):
        raise ConfigError(f"sliding_window {config['sliding_window']} is not supported for family {family}")
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_heads=heads,
        layers=(layer,) * num_layers,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        context_length=int(config.get("max_position_embeddings", 2048)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        stop_ids=_ids(config.get("eos_token_id")),
        bos_id=next(iter(_ids(config.get("bos_token_id"))), None),
        qk_norm=family == "qwen3",
    )


def _count(fields: Mapping[str, Any], name: str, where: str, least: int = 1) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        given = "missing" if value is None else repr(value)
        raise ConfigError(f"{where}: {name} is {given}, expected a whole number of at least {least}")
    return value


def _optional_count(fields: Mapping[str, Any], name: str, where: str, default: int) -> int:
    return default if fields.get(name) is None else _count(fields, name, where)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list | tuple) else (int(value),)


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: flat `rope_theta` + `rope_scaling`, and `rope_parameters` of transformers 5."""
    parameters = config.get("rope_parameters") or {
        **(config.get("rope_scaling") or {}),
        "rope_theta": config.get("rope_theta"),
    }
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    try:
        if kind == "default":
            return RopeConfig(theta=theta)
        if kind == "linear":
            return RopeConfig(theta=theta, linear_factor=float(parameters["factor"]))
        if kind == "llama3":
            return RopeConfig(
                theta=theta,
                llama3_factor=float(parameters["factor"]),
                llama3_low_freq_factor=float(parameters["low_freq_factor"]),
                llama3_high_freq_factor=float(parameters["high_freq_factor"]),
                llama3_original_context=int(parameters["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise ConfigError(f"rope type {kind} needs the field {error}, which config.json does not have") from error
    raise ConfigError(f"rope type {kind!r} is not supported; supported: default, linear, llama3")


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
    num_target_layers: int
    vocab_size: int

    @property
    def num_layers(self) -> int:
        return len(self.windows)

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


def default_target_layers(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Which target layers feed a drafter that does not say so: evenly spread from layer 1 to the last but two."""
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    return tuple(
        round(1 + index * (num_target_layers - 4) / (num_draft_layers - 1)) for index in range(num_draft_layers)
    )


def drafter_from_hf(config: Mapping[str, Any]) -> DrafterConfig:
    """Normalises the `config.json` of z-lab's DFlash checkpoints.

    Raises ConfigError when a field is missing or names a variant that is not supported.
    """
    options = dict(config.get("dflash_config") or {})
    unsupported = [
        name
        for name in ("projector_type", "conv_kernel_size", "selector_rank", "attention_sink_bias")
        if options.get(name)
    ]
    if unsupported:
        raise ConfigError(f"drafter variant with {', '.join(unsupported)} is not supported; supported: DFlash 1")
    where = "config.json of a drafter"
    hidden, heads = _count(config, "hidden_size", where), _count(config, "num_attention_heads", where)
    count, num_target_layers = _count(config, "num_hidden_layers", where), _count(config, "num_target_layers", where)
    width, vocab_size = _count(config, "intermediate_size", where), _count(config, "vocab_size", where)
    mask_id = _count(options, "mask_token_id", f"dflash_config in {where}", least=0)
    kinds = list(config.get("layer_types") or ["full_attention"] * count)
    window = config.get("sliding_window") or options.get("swa_window_size")
    sliding = [kind == "sliding_attention" for kind in kinds]
    is_causal = config.get("is_causal", options.get("causal"))
    return DrafterConfig(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_optional_count(config, "num_key_value_heads", where, heads),
        head_dim=_optional_count(config, "head_dim", where, hidden // heads),
        mlp_width=width,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config),
        block_size=int(config.get("block_size") or options.get("block_size") or 16),
        mask_id=mask_id,
        target_layers=tuple(options.get("target_layer_ids") or default_target_layers(num_target_layers, count)),
        windows=tuple(int(window) if slides and window else None for slides in sliding),
        causal=tuple(slides if is_causal is None else bool(is_causal) for slides in sliding),
        num_target_layers=num_target_layers,
        vocab_size=vocab_size,
    )
