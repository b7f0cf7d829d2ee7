"""Whether drafting pays: a sequence's accept length against what a block costs beside a plain step.

Drafting never changes tokens, so this may look at anything. Records are immutable; the engine keeps one `StepTimes` and
one `Pace` per sequence.
"""

from __future__ import annotations

import dataclasses

_WEIGHT = 0.2
"""Weight of a new measurement in a running mean."""
_FIRST_STEPS = 4
"""Blocks to look at before a verdict."""
_FIRST_PAUSE, _LONGEST_PAUSE = 64, 1024
"""Plain tokens between two probes of a drafter that does not pay; doubled after each probe that fails."""


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds per step, running means: a plain step and a block (draft and verify)."""

    plain: float
    block: float

    def observe(self, *, drafted: bool, steps: int, seconds: float) -> StepTimes:
        """Takes in one visit.

        One that was held up (a compilation, a busy machine) counts as twice the usual at most: while drafting pays,
        plain steps are not measured again, and a single outlier must not make it pay for ever.
        """
        if steps <= 0:
            return self
        name = "block" if drafted else "plain"
        old = getattr(self, name)
        return dataclasses.replace(self, **{name: old + _WEIGHT * (min(seconds / steps, 2 * old) - old)})


@dataclasses.dataclass(frozen=True)
class Pace:
    """What is known of one sequence: blocks seen, running accept length, plain tokens to go until the next probe."""

    blocks: int = 0
    accept_length: float = 0.0
    pause: int = 0
    next_pause: int = _FIRST_PAUSE

    def drafts(self, times: StepTimes) -> bool:
        """Whether the next visit should draft."""
        if self.blocks < _FIRST_STEPS:
            return True
        return self.pays(times) or self.pause <= 0

    def pays(self, times: StepTimes) -> bool:
        """Whether a block commits tokens faster than plain steps do."""
        return self.accept_length * times.plain > times.block

    def observe(self, times: StepTimes, *, drafted: bool, steps: int, committed: int) -> Pace:
        """Takes in one visit that committed so many tokens."""
        if steps <= 0:
            return self
        if not drafted:
            return dataclasses.replace(self, pause=self.pause - committed)
        mean = committed / steps
        weight = max(_WEIGHT, 1 / (self.blocks + 1)) if self.blocks < _FIRST_STEPS else 1 - (1 - _WEIGHT) ** steps
        seen = dataclasses.replace(
            self, blocks=self.blocks + steps, accept_length=self.accept_length + weight * (mean - self.accept_length)
        )
        if seen.pays(times):
            return dataclasses.replace(seen, pause=0, next_pause=_FIRST_PAUSE)
        longer = min(2 * self.next_pause, _LONGEST_PAUSE)
        return dataclasses.replace(seen, pause=self.next_pause, next_pause=longer)
