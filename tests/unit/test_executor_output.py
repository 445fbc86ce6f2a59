"""Output is split exactly at the marker, wherever the stream is cut, and it is bounded."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.node.executor_output import OutputSplitter, Written

MARKER = b"<mark>"


def split(chunks, bytes_max=1000):
    splitter = OutputSplitter(MARKER, bytes_max)
    for chunk in chunks:
        splitter.feed(chunk)
    return splitter


@pytest.mark.parametrize(
    ("chunks", "parts", "rest"),
    [
        pytest.param([b"one", MARKER], [b"one"], b"", id="one task"),
        pytest.param([MARKER], [b""], b"", id="a task that wrote nothing"),
        pytest.param([b"a<mark>b<mark>c"], [b"a", b"b"], b"c", id="several in one chunk"),
        pytest.param([b"a<ma", b"rk>b"], [b"a"], b"b", id="a marker over a border"),
        pytest.param([b"a<", b"m", b"a", b"r", b"k", b">", b"b"], [b"a"], b"b", id="a marker in single bytes"),
        pytest.param([b"<mar", b"<mark>"], [b"<mar"], b"", id="half a marker before a whole one"),
        pytest.param([b"<ma<ma", b"rk>"], [b"<ma"], b"", id="half a marker and then one over a border"),
        pytest.param([b"a<mar"], [], b"a<mar", id="half a marker is output until it is whole"),
    ],
)
def test_output_is_split_at_the_marker(chunks, parts, rest):
    splitter = split(chunks)
    assert list(splitter.parts) == [Written(part, 0) for part in parts]
    assert splitter.so_far() == Written(rest, 0)


@given(
    parts=st.lists(st.binary(max_size=60).filter(lambda part: MARKER not in part + MARKER[:-1]), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 400), max_size=10),
    bytes_max=st.integers(0, 40),
)
def test_how_the_stream_is_cut_changes_nothing(parts, cuts, bytes_max):
    stream = b"".join(part + MARKER for part in parts)
    borders = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    splitter = split([stream[start:end] for start, end in itertools.pairwise(borders)], bytes_max)
    expected = [Written(part[max(0, len(part) - bytes_max) :], max(0, len(part) - bytes_max)) for part in parts]
    assert list(splitter.parts) == expected


def test_a_flood_keeps_its_end_in_bounded_memory():
    splitter = OutputSplitter(MARKER, 100)
    for index in range(10_000):
        splitter.feed(b"%06d\n" % index * 10)
        assert len(splitter._open) <= 2 * 100 + len(MARKER) + 70
    splitter.feed(MARKER)
    end = b"009998\n" * 10 + b"009999\n" * 10
    assert list(splitter.parts) == [Written(end[-100:], 699_900)]


def test_what_was_dropped_of_one_task_is_not_counted_to_the_next():
    splitter = split([b"x" * 50, MARKER, b"next", MARKER], bytes_max=10)
    assert list(splitter.parts) == [Written(b"x" * 10, 40), Written(b"next", 0)]


def test_output_can_be_cut_where_a_task_broke_its_pipe():
    splitter = split([b"abc"])
    assert splitter.cut() == Written(b"abc", 0)
    assert splitter.so_far() == Written(b"", 0)
