"""A model's chat template: messages to text, rendered as transformers renders it."""

from __future__ import annotations

import datetime
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from dflash_jax.engine.request import RequestError

RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
"""Variables that a template gets from the conversation and the model; nobody else may set them."""

_PINNED = {"gemma4": "gemma4.jinja"}


def pinned_template(family: str) -> str | None:
    """The template for models of a family that come without one, where one is known for all of them."""
    name = _PINNED.get(family)
    return name and (importlib.resources.files("dflash_jax.engine") / "templates" / name).read_text(encoding="utf-8")


class ChatTemplate:
    """A Jinja chat template, run in a sandbox that cannot change its inputs.

    source may be None, for a model that has none: rendering then raises RequestError. bos and eos are the strings of
    those tokens. Raises ValueError when the source is not a valid template.
    """

    def __init__(self, source: str | None, bos: str | None = None, eos: str | None = None) -> None:
        self.source = source
        self.bos = bos or ""
        self.eos = eos or ""
        self.literals = ""
        """All text and string constants of the template, NUL between them."""
        self._template: jinja2.Template | None = None
        if source is None:
            return
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error
        texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
        texts += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        self.literals = "\0".join(texts)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation; `variables` are the template's own, such as enable_thinking.

        Raises RequestError for a variable that is not the caller's to set, when the template refuses the conversation,
        or when there is no template.
        """
        if self._template is None:
            raise RequestError(
                "this model has no chat template: send `prompt` (plain text) instead of `messages`", param="messages"
            )
        variables = variables or {}
        for name in variables:
            if name in RESERVED:
                raise RequestError(
                    f"chat_template_kwargs.{name} is set by the conversation itself; leave it out",
                    param="chat_template_kwargs",
                )
        try:
            return self._template.render(
                **{"bos_token": self.bos, "eos_token": self.eos, "documents": None, **variables},
                messages=messages,
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
            )
        except (
            Exception
        ) as error:  # a template is the model's own program: whatever it raises, it refuses this conversation
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RequestError(
                f"the model's chat template cannot render these messages: {reason}", param="messages"
            ) from error


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks assistant text for training masks; here its body is simply rendered."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
