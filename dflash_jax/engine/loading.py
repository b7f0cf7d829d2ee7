"""From files to networks on the device: the target, and the drafter and scorer that fit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import checkpoints
from dflash_jax.engine.compilation import enable_persistent_cache
from dflash_jax.engine.profile import Profile, profile_for_device
from dflash_jax.engine.template import ChatTemplate, pinned_template
from dflash_jax.engine.tokenizer import Tokenizer
from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.decoder import Decoder
from dflash_jax.models.drafter import Drafter

Progress = Callable[[str, int, int], None]
"""Called with a label, how much is done, and how much there is."""


@dataclasses.dataclass(frozen=True)
class Model:
    """What an engine runs. Several engines may share one."""

    target: Decoder
    profile: Profile
    model_id: str = "model"
    tokenizer: Tokenizer | None = None
    template: ChatTemplate = dataclasses.field(default_factory=lambda: ChatTemplate(None))
    drafter: Drafter | None = None
    scorer: Decoder | None = None


def load_model(
    path: str | Path | None = None,
    *,
    drafter: str | Path | None = None,
    scorer: str | Path | None = None,
    profile: Profile | None = None,
    progress: Progress | None = None,
    with_drafter: bool = True,
) -> Model:
    """Reads the model at `path` (a converted folder, a Hugging Face folder or a GGUF), or the default model.

    The default model comes with a drafter of its own, which is left out where `with_drafter` is not set. Raises
    CheckpointError, ConfigError or TokenizerError with a line that says what to do.
    """
    enable_persistent_cache()
    source = checkpoints.default_model(progress) if path is None else Path(path)
    if path is None and drafter is None and with_drafter:
        drafter = checkpoints.default_drafter(progress)
    profile = profile or profile_for_device()
    loaded = checkpoints.load(source, progress=progress)
    if not isinstance(loaded.config, ModelConfig):
        raise checkpoints.CheckpointError(f"{source} holds a drafter: give the target here and this with --drafter")
    tokenizer = Tokenizer(loaded.tokenizer_json) if loaded.tokenizer_json else None
    return Model(
        target=Decoder(loaded.config, loaded.parameters, dtype=profile.dtype),
        profile=profile,
        model_id=source.resolve().name.removesuffix(".gguf"),
        tokenizer=tokenizer,
        template=_template(loaded.chat_template, tokenizer, loaded.config),
        drafter=_load_drafter(drafter, loaded.config, profile) if drafter is not None else None,
        scorer=_load_scorer(scorer, loaded.config, profile) if scorer is not None else None,
    )


def _template(source: str | None, tokenizer: Tokenizer | None, config: ModelConfig) -> ChatTemplate:
    if tokenizer is None:
        return ChatTemplate(None)
    bos = tokenizer.token(config.bos_id) if config.bos_id is not None else None
    eos = tokenizer.token(config.stop_ids[0]) if config.stop_ids else None
    if source is None:
        source = pinned_template(config.family)
    try:
        return ChatTemplate(source, bos=bos, eos=eos)
    except ValueError as error:
        raise checkpoints.CheckpointError(f"the model's {error}: put a right one into chat_template.jinja") from error


def _load_drafter(path: str | Path, target: ModelConfig, profile: Profile) -> Drafter:
    loaded = checkpoints.load(Path(path))
    config = loaded.config
    if not isinstance(config, DrafterConfig):
        raise checkpoints.CheckpointError(f"{path} is not a drafter: it holds a {config.family} model")
    for name, ours, theirs in (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("number of target layers", config.num_target_layers or target.num_layers, target.num_layers),
        ("vocabulary", config.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise checkpoints.CheckpointError(
                f"the drafter {path} was made for another target: its {name} is {ours}, the target's {theirs}"
            )
    if config.mask_id >= target.vocab_size:
        raise checkpoints.CheckpointError(
            f"the drafter {path} was made for another target: its mask id {config.mask_id} is beyond the vocabulary of "
            f"{target.vocab_size}"
        )
    if max(config.target_layers) >= target.num_layers:
        raise checkpoints.CheckpointError(
            f"the drafter {path} was made for another target: it reads layer {max(config.target_layers)}, "
            f"the target has {target.num_layers}"
        )
    return Drafter(config, loaded.parameters, dtype=profile.dtype)


def _load_scorer(path: str | Path, target: ModelConfig, profile: Profile) -> Decoder:
    loaded = checkpoints.load(Path(path))
    if not isinstance(loaded.config, ModelConfig):
        raise checkpoints.CheckpointError(f"{path} is a drafter and cannot score")
    if loaded.config.vocab_size != target.vocab_size:
        raise checkpoints.CheckpointError(
            f"the scorer {path} has a vocabulary of {loaded.config.vocab_size}, the target of {target.vocab_size}: "
            "they must share a tokenizer"
        )
    return Decoder(loaded.config, loaded.parameters, dtype=profile.dtype)
