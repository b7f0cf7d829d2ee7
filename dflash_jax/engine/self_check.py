"""A drafter that does not belong to its target proposes nonsense in silence; a few canned answers show it at start."""

from __future__ import annotations

LEAST_ACCEPT_LENGTH = 1.5
"""Below it a drafter is broken or a stranger: one that was trained for its target reaches 2 and more on these."""
TOKENS = 48
PROMPTS = (
    "Write a Python function that checks whether a number is prime.",
    "What is 17 times 24? Explain step by step.",
    "List the planets of the solar system in order.",
)


def warning(accept_length: float) -> str | None:
    """What to tell whoever started the engine, if the mean accept length is not that of a drafter in order."""
    if accept_length >= LEAST_ACCEPT_LENGTH:
        return None
    return (
        f"WARNING: the drafter's accept length is {accept_length:.2f} on canned prompts (expected: "
        f"{LEAST_ACCEPT_LENGTH} or more). Answers stay right but are not faster. Likely causes: the drafter was "
        "trained for another target or another chat template, its target layer ids or mask id are off by one, its "
        "RoPE or embedding scale differs, or it was quantised."
    )
