from __future__ import annotations

from dflash_jax.engine.request import Marker, TextDelta
from dflash_jax.server.tools.pieces import PieceOrder


def test_markers_stand_where_they_were_generated() -> None:
    order = PieceOrder()
    hidden, visible = Marker(2, "<h>", True), Marker(3, "<v>", False)
    assert order.push(TextDelta("ab", (1, 2, 3), (hidden, visible))) == ["ab", hidden]
    assert order.push(TextDelta("c<", (4,))) == ["c"]
    assert order.push(TextDelta("v>d", (4,))) == [visible, "d"]
    assert order.flush() == []


def test_a_marker_waits_for_text_that_is_held_back_before_it() -> None:
    order = PieceOrder()
    marker = Marker(3, "<h>", True)
    assert order.push(TextDelta("a", (1, 2), (marker,))) == ["a"]
    assert order.push(TextDelta("bcd", (3,))) == ["bc", marker, "d"]


def test_a_marker_that_a_stop_string_cuts_is_text() -> None:
    order = PieceOrder()
    assert order.push(TextDelta("a<to", (1,), (Marker(1, "<tool>", False), Marker(9, "<h>", True)))) == ["a"]
    assert order.flush() == ["<to"]


def test_places_count_the_text_of_visible_markers() -> None:
    order = PieceOrder()
    visible, hidden = Marker(0, "<v>", False), Marker(4, "<h>", True)
    assert order.push(TextDelta("<v>ab", (1, 2, 3, 4), (visible, hidden))) == [visible, "a", hidden, "b"]
