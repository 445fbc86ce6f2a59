"""Following a log: whatever is kept of it and whenever one asks, each byte is shown once, or said to be missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.api.logs import BEGINNING, Cursor, extent_of, log_since, parse_cursor
from manager.core.errors import BadRequest
from manager.store.calls_tasks import KeptLog


def kept(attempt: int, written: bytes, keep: int) -> KeptLog:
    """The end of what was written to stdout."""
    dropped = max(0, len(written) - keep)
    return KeptLog(attempt, written[dropped:], b"", dropped, 0)


@given(text=st.text(max_size=60), cuts=st.lists(st.integers(0, 240), max_size=8), keep=st.integers(1, 80))
def test_all_that_was_written_is_shown_once_or_told_to_be_missing(text, cuts, keep):
    whole = text.encode()
    shown, missing, cursor = "", 0, BEGINNING
    for cut in [*sorted(min(cut, len(whole)) for cut in cuts), len(whole)]:
        log = kept(1, whole[:cut], keep)
        piece = log_since("t", log, cursor, ended=cut == len(whole))
        shown, missing, cursor = shown + piece.stdout, missing + piece.dropped_bytes, parse_cursor(piece.cursor)
        if missing == 0:
            assert text.startswith(shown)  # never half of a character
    assert cursor == Cursor(1, len(whole), 0)
    if missing == 0:
        assert shown == text
    else:
        assert len(shown.encode()) + missing >= len(whole)  # a character that was cut in two is shown as a sign for that


def test_a_new_attempt_is_shown_from_its_beginning():
    first = log_since("t", kept(1, b"long ago", 99), BEGINNING, ended=False)
    second = log_since("t", kept(2, b"new", 99), parse_cursor(first.cursor), ended=True)
    assert (second.stdout, second.attempt, second.dropped_bytes, second.ended) == ("new", 2, 0, True)


def test_what_has_written_nothing_has_a_cursor_too():
    nothing = KeptLog(0, b"", b"", 0, 0)
    piece = log_since("t", nothing, BEGINNING, ended=False)
    assert parse_cursor(piece.cursor) == BEGINNING == extent_of(nothing)


def test_a_cursor_beyond_the_end_waits_there():
    """A store that was restored may have less than was read."""
    piece = log_since("t", kept(1, b"ab", 99), Cursor(1, 5, 0), ended=False)
    assert (piece.stdout, piece.cursor, piece.dropped_bytes) == ("", "1.5.0", 0)


@pytest.mark.parametrize("text", ["", "1", "1.2", "1.2.3.4", "a.b.c", "-1.0.0", "1.2.3\n", "9" * 20 + ".0.0", "١.٢.٣"])
def test_what_is_no_cursor_is_refused(text):
    with pytest.raises(BadRequest, match="cursor"):
        parse_cursor(text)
