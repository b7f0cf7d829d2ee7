"""Stop strings in a stream against a search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.engine.stop import StopFinder

STOPS = st.lists(st.text("ab\n", max_size=5), max_size=3).map(tuple)
PIECES = st.lists(st.text("ab\n", max_size=4), max_size=12)


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    """What is shown after each piece and at the end, and whether a stop was met."""
    finder, shown, hit = StopFinder(stops), [], False
    for piece in pieces:
        text, hit = finder.push(piece)
        shown.append(text)
        if hit:
            break
    return [*shown, finder.flush()], hit


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    return min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=None)


@settings(max_examples=300, deadline=None)
@given(STOPS, PIECES)
def test_one_character_at_a_time_shows_the_text_up_to_the_first_stop(stops: tuple[str, ...], pieces: list[str]) -> None:
    """The stop that is complete first wins, which is the one a reader of the stream would see first."""
    text = "".join(pieces)
    ends = [place + len(stop) for stop in stops if stop and (place := text.find(stop)) >= 0]
    read = text[: min(ends, default=len(text))]
    place = first_stop(read, stops)
    shown, hit = run(stops, list(text))
    assert hit == (place is not None)
    assert "".join(shown) == (text if place is None else read[:place])


@settings(max_examples=300, deadline=None)
@given(STOPS, PIECES)
def test_pieces_show_what_was_read_up_to_its_first_stop(stops: tuple[str, ...], pieces: list[str]) -> None:
    shown, hit = run(stops, pieces)
    read, place = "", None
    for piece in pieces:
        read += piece
        place = first_stop(read, stops)
        if place is not None:
            break
    assert hit == (place is not None)
    assert "".join(shown) == (read if place is None else read[:place])


@settings(max_examples=300, deadline=None)
@given(STOPS, PIECES)
def test_no_stop_string_is_shown_and_only_its_possible_beginnings_are_held(
    stops: tuple[str, ...], pieces: list[str]
) -> None:
    finder, shown, read = StopFinder(stops), "", ""
    for piece in pieces:
        text, hit = finder.push(piece)
        shown, read = shown + text, read + piece
        assert not any(stop in shown for stop in stops if stop)
        if hit:
            break
        held = read[len(shown) :]
        assert read.startswith(shown)
        assert not held or any(stop.startswith(held) and len(held) < len(stop) for stop in stops)


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert StopFinder(()).push("text") == ("text", False)
    assert StopFinder(("",)).push("text") == ("text", False)


def test_text_after_a_stop_is_lost() -> None:
    finder = StopFinder(("STOP",))
    assert finder.push("a ST") == ("a ", False)
    assert finder.push("OP b") == ("", True)
    assert finder.push("c") == ("", True)
    assert finder.flush() == ""


@pytest.mark.parametrize(
    ("pieces", "shown"), [(["ab", "ac"], "ab"), (["aab", "x"], "aabx"), (["a", "a", "a", "c"], "aa")]
)
def test_a_beginning_that_goes_on_otherwise_is_shown_after_all(pieces: list[str], shown: str) -> None:
    assert "".join(run(("ac",), pieces)[0]) == shown
