"""How training conversations begin: prompts of the user's own, or beginnings of questions that the target completes."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dflash_jax.engine.request import RequestError
from dflash_jax.engine.template import ChatTemplate
from dflash_jax.engine.tokenizer import Tokenizer

_ROLES = ("system", "developer", "user", "assistant", "tool")
_CUT = "\ufdd1"
"""Stands where a rendered conversation is cut; a noncharacter, which no template touches."""
_WORD = re.compile(rb" [A-Z]?[a-z]{4,}")
"""A token that is a whole word."""


@dataclasses.dataclass(frozen=True)
class Opening:
    """Messages of which the last is the user's; if not `whole`, the target goes on writing that one."""

    messages: tuple[dict[str, Any], ...]
    whole: bool


@dataclasses.dataclass(frozen=True)
class Openings:
    """Openings, and how many lines of a file were none."""

    found: tuple[Opening, ...]
    skipped: int = 0

    def forever(self, generator: np.random.Generator) -> Iterator[Opening]:
        """All of them in random order, then again in another order, and so on."""
        while self.found:
            for index in generator.permutation(len(self.found)):
                yield self.found[index]


def read_openings(path: Path) -> Openings:
    """Prompts from JSON lines, {"messages": [...]} or {"prompt": "..."}; an answer at the end is left out.

    Broken lines and conversations with empty or unusual turns are skipped and counted. Raises RequestError when nothing
    is left.
    """
    found, skipped = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip():
            opening = _opening(line)
            found += [opening] if opening else []
            skipped += opening is None
    if not found:
        raise RequestError(f"{path} holds no conversation that can be used ({skipped} lines skipped)")
    return Openings(tuple(found), skipped)


def own_openings(words: Sequence[str], seed: int = 0) -> Openings:
    """Beginnings of what people ask, from openings.json: every form with every subject that fits it.

    Kinds about `words` take some of those for each form, drawn with `seed`.
    """
    text = (importlib.resources.files("dflash_jax.train") / "openings.json").read_text(encoding="utf-8")
    table = json.loads(text)
    generator, words = np.random.default_rng(seed), list(words)
    found = []
    for kind in table["kinds"]:
        system = [{"role": "system", "content": kind["system"]}] if "system" in kind else []
        for form in kind["forms"]:
            if "words" in kind:
                subjects = generator.choice(words, min(kind["words"], len(words)), replace=False) if words else ()
            else:
                subjects = table["subjects"].get(kind.get("subjects"), [""])
            for subject in subjects:
                user = {"role": "user", "content": form.replace("{}", str(subject))}
                found += [Opening((*system, user), whole=False)] * kind.get("weight", 1)
    return Openings(tuple(found))


def plain_words(tokenizer: Tokenizer) -> list[str]:
    """Words that a vocabulary has as one token, written in Latin letters: thousands of subjects to ask about."""
    spelt = (tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size))
    return sorted({text[1:].decode() for text in spelt if _WORD.fullmatch(text)})


def _opening(line: str) -> Opening | None:
    try:
        row = json.loads(line)
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        usable = all(message["role"] in _ROLES for message in messages) and all(
            isinstance(message["content"], str) and message["content"].strip() for message in messages
        )
        if usable and messages and messages[-1]["role"] == "user":
            return Opening(tuple(messages), whole=True)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    return None


@dataclasses.dataclass(frozen=True)
class Joints:
    """Token ids between the turns of a conversation, as the chat template writes them."""

    to_answer: np.ndarray
    """From the end of a user's words to the beginning of the answer."""
    to_user: np.ndarray
    """From the end of an answer's words to the beginning of the user's next ones."""


def joints(template: ChatTemplate, tokenizer: Tokenizer) -> Joints:
    """What a template puts between turns."""
    turns = [{"role": role, "content": f"a{_CUT}"} for role in ("user", "assistant")]
    again = {"role": "user", "content": f"{_CUT}a{_CUT}"}
    parts = template.render([*turns, again]).split(_CUT)
    if len(parts) != 5:
        raise RequestError("the model's chat template does not show all turns of a conversation")
    return Joints(tokenizer.encode(parts[4]), tokenizer.encode(parts[2]))


def opening_ids(opening: Opening, template: ChatTemplate, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of an opening up to the end of its last words. Raises RequestError when the template refuses it."""
    last = opening.messages[-1]
    messages: Sequence[dict[str, Any]] = [*opening.messages[:-1], {**last, "content": f"{last['content']}{_CUT}"}]
    return tokenizer.encode(template.render(messages, add_generation_prompt=False).split(_CUT)[0])


class Rendered:
    """Openings with their token ids, without end, in random order.

    Those that the template refuses are left out and counted in `skipped`. Raises RequestError when it refuses all.
    """

    def __init__(self, openings: Openings, template: ChatTemplate, tokenizer: Tokenizer, seed: int) -> None:
        self.skipped = openings.skipped
        self._openings = openings.forever(np.random.default_rng(seed))
        self._patience = 2 * len(openings.found)  # any so many in a row have all of them
        self._template, self._tokenizer = template, tokenizer

    def __iter__(self) -> Rendered:
        return self

    def __next__(self) -> tuple[Opening, np.ndarray]:
        for _ in range(self._patience):
            opening = next(self._openings)
            try:
                return opening, opening_ids(opening, self._template, self._tokenizer)
            except RequestError as error:
                self.skipped, refused = self.skipped + 1, error
        raise RequestError(f"the chat template refuses all prompts: {refused}")
