"""How many rows the next steps verify: what a sequence's proposals survive against what a step of so many rows costs.

Drafting never changes tokens, and what is decided here holds for steps to come, so this may look at anything. Records
are immutable; the engine keeps one `StepTimes` and one `Pace` per sequence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

PLAIN = 0
"""Stands for a step without proposals where a number of rows is expected."""
_WEIGHT = 0.2
"""Weight of a new measurement in a running mean of times."""
_MEMORY = 0.95
"""What is left of a step's evidence after the next step."""
_PRIOR, _PRIOR_STEPS = 0.6, 2.0
"""A proposal's chance before anything is known, and how many steps that is worth."""
_FIRST_STEPS = 4
"""Blocks to look at before a verdict."""
_FIRST_PAUSE, _LONGEST_PAUSE = 64, 1024
"""Plain tokens between two probes of a drafter that does not pay; doubled after each probe that fails."""


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds per step, running means: a plain step, and a block (draft and verify) for each number of rows."""

    plain: float
    blocks: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def of(self, rows: int) -> float:
        """Seconds of a block of so many rows, or of a plain step."""
        return self.blocks[rows] if rows else self.plain

    def observe(self, rows: int, *, steps: int, seconds: float) -> StepTimes:
        """Takes in one visit. What slows one block slows blocks of all sizes.

        A visit that was held up (a compilation, a busy machine) counts as twice the usual at most: while drafting pays,
        plain steps are not measured again, and a single outlier must not make it pay for ever.
        """
        if steps <= 0:
            return self
        usual = self.of(rows)
        slower = 1 + _WEIGHT * (min(seconds / steps / usual, 2.0) - 1)
        if rows == PLAIN:
            return dataclasses.replace(self, plain=self.plain * slower)
        return dataclasses.replace(self, blocks={size: each * slower for size, each in self.blocks.items()})


@dataclasses.dataclass(frozen=True)
class Pace:
    """What is known of one sequence: how often each proposal was reached and accepted, and when to probe next.

    Entry k of `reached` counts steps that accepted all of the k proposals before proposal k + 1 and verified that one,
    entry k of `accepted` those that accepted it too; old steps fade.
    """

    reached: tuple[float, ...] = ()
    accepted: tuple[float, ...] = ()
    blocks: int = 0
    pause: int = 0
    next_pause: int = _FIRST_PAUSE

    def expected(self, rows: int) -> float:
        """Tokens that a block of so many rows is expected to commit: the sum of what its rows survive."""
        known = zip(self.reached, self.accepted, strict=True)
        pooled = self._chance(sum(self.reached), sum(self.accepted), _PRIOR)
        chances = [self._chance(reached, accepted, pooled) for reached, accepted in known]
        chances += [pooled] * (rows - 1 - len(chances))
        return 1.0 + sum(itertools.accumulate(chances[: rows - 1], lambda survived, chance: survived * chance))

    def best_block(self, times: StepTimes) -> int:
        """The number of rows that commits most tokens per second when it drafts."""
        return max(times.blocks, key=lambda rows: self.expected(rows) / times.of(rows))

    def pays(self, times: StepTimes) -> bool:
        """Whether the best block commits tokens faster than plain steps do."""
        best = self.best_block(times)
        return self.expected(best) * times.plain > times.of(best)

    def rows(self, times: StepTimes) -> int:
        """Rows of the next visit's steps, or PLAIN."""
        if not times.blocks:
            return PLAIN
        probes = self.blocks < _FIRST_STEPS or self.pause <= 0
        return self.best_block(times) if probes or self.pays(times) else PLAIN

    def observe(self, times: StepTimes, rows: int, committed: Sequence[int]) -> Pace:
        """Takes in one visit; entry c of `committed` counts the steps that committed c tokens."""
        steps = sum(committed[1:])
        if steps <= 0:
            return self
        if rows == PLAIN:
            tokens = sum(count * number for count, number in enumerate(committed))
            return dataclasses.replace(self, pause=self.pause - tokens)
        at_least = list(itertools.accumulate(reversed(committed)))[::-1]
        faded = _MEMORY**steps
        seen = dataclasses.replace(
            self,
            reached=_add(self.reached, at_least[1:rows], faded),
            accepted=_add(self.accepted, at_least[2 : rows + 1], faded),
            blocks=self.blocks + steps,
        )
        if seen.blocks < _FIRST_STEPS or seen.pays(times):
            return dataclasses.replace(seen, pause=0, next_pause=_FIRST_PAUSE)
        return dataclasses.replace(seen, pause=self.next_pause, next_pause=min(2 * self.next_pause, _LONGEST_PAUSE))

    @staticmethod
    def _chance(reached: float, accepted: float, prior: float) -> float:
        return (accepted + _PRIOR_STEPS * prior) / (reached + _PRIOR_STEPS)


def _add(old: Sequence[float], new: Sequence[float], faded: float) -> tuple[float, ...]:
    return tuple(faded * before + now for before, now in itertools.zip_longest(old, new, fillvalue=0.0))
