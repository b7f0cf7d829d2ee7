"""Text and markers of an answer, put in order."""

from __future__ import annotations

import collections

from dflash_jax.engine.request import Marker, TextDelta
from dflash_jax.server.tools.events import Piece


class PieceOrder:
    """Deltas in, pieces out: markers stand where they were generated, though their text may come later."""

    def __init__(self) -> None:
        self._markers: collections.deque[Marker] = collections.deque()
        self._held = ""
        self._given = 0

    def push(self, delta: TextDelta) -> list[Piece]:
        """The pieces that are complete now."""
        self._held += delta.text
        self._markers.extend(delta.markers)
        pieces: list[Piece] = []
        while self._markers and self._markers[0].place - self._given <= len(self._held):
            marker = self._markers[0]
            pieces += self._take(marker.place - self._given)
            length = 0 if marker.hidden else len(marker.text)
            if len(self._held) < length:
                return pieces
            pieces.append(self._markers.popleft())
            self._held, self._given = self._held[length:], self._given + length
        return pieces + self._take(len(self._held))

    def flush(self) -> list[Piece]:
        """The rest, when the answer has ended: a marker that was cut off is text."""
        return self._take(len(self._held))

    def _take(self, length: int) -> list[Piece]:
        text, self._held = self._held[:length], self._held[length:]
        self._given += length
        return [text] if text else []
