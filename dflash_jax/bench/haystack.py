"""Conversations of any length with one fact hidden in a long document, and the question that asks for it.

The document is the language reference that every Python carries: real text, always there, the same on every machine.
"""

from __future__ import annotations

import dataclasses
import pydoc_data.topics
from typing import Any


@dataclasses.dataclass(frozen=True)
class Needle:
    """A sentence, the question that only it answers, and what a right answer contains."""

    sentence: str
    question: str
    answer: str


NEEDLES = (
    Needle(
        "The secret code for the vault in Lisbon is 48213.", "What is the secret code for the vault in Lisbon?", "48213"
    ),
    Needle("Marta's cat is called Pudding and it only eats smoked salmon.", "What is Marta's cat called?", "Pudding"),
    Needle(
        "The auditors moved their meeting to room B12.", "To which room did the auditors move their meeting?", "B12"
    ),
    Needle("The gardener planted 37 tulips behind the old mill.", "How many tulips did the gardener plant?", "37"),
)


def conversation(characters: int, needle: Needle, *, depth: float = 0.5, offset: int = 0) -> list[dict[str, Any]]:
    """Messages whose first one is a document of so many characters with the needle at a fraction `depth` of it.

    Documents of different `offset` have different beginnings.
    """
    topics = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    start = offset % max(1, len(topics) - characters)
    text = topics[start : start + characters]
    place = text.rfind("\n", 0, int(len(text) * depth)) + 1
    document = f"{text[:place]}\n{needle.sentence}\n\n{text[place:]}"
    return [
        {"role": "user", "content": f"Read this document.\n\n{document}"},
        {"role": "assistant", "content": "I have read the document."},
        {"role": "user", "content": needle.question},
    ]
