"""Whether an answer has fallen into a loop, the visible sign of a target that has lost the thread."""

from __future__ import annotations

import numpy as np

_LONGEST_PERIOD = 32
_LEAST_REPEATS = 4
_LEAST_TOKENS = 48


def degenerate(token_ids: np.ndarray) -> bool:
    """Whether i32[n] ends in the same 1 to 32 tokens over and over: at least 4 times and 48 tokens long."""
    ids = np.asarray(token_ids)
    for period in range(1, _LONGEST_PERIOD + 1):
        length = max(_LEAST_TOKENS, _LEAST_REPEATS * period)
        tail = ids[len(ids) - length :] if length <= len(ids) else ids[:0]
        if len(tail) and np.array_equal(tail[period:], tail[:-period]):
            return True
    return False
