"""Sizes and durations: text for people becomes whole numbers, and nonsense is refused with the remedy."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.core.quantities import (
    GIB,
    KIB,
    MEMORY_BYTES_MAX,
    MIB,
    TIB,
    format_duration,
    format_memory,
    parse_duration,
    parse_memory,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("24GiB", 24 * GIB),
        ("24 gib", 24 * GIB),
        (" 1.5GiB ", 3 * GIB // 2),
        ("512Mi", 512 * MIB),
        ("1kib", KIB),
        ("2TiB", 2 * TIB),
        ("500 MB", 500_000_000),
        ("1g", 1_000_000_000),
        ("64", 64),
        ("64b", 64),
        (1, 1),
        (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX),
        ("0.5KiB", 512),
    ],
)
def test_a_size_is_read(text, size_bytes):
    assert parse_memory(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "24 GiBs",
        "24 XiB",
        "-1GiB",
        "1e3",
        "nan",
        "inf",
        "1,5GiB",
        "٣GiB",
        "0",
        "0.0001b",
        "9" * 40,
        "2048TiB",
        0,
        -1,
        MEMORY_BYTES_MAX + 1,
        True,
    ],
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a size|is out of range"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0"),
        (1, "1 B"),
        (1023, "1023 B"),
        (KIB, "1 KiB"),
        (300 * MIB, "300 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (192 * GIB, "192 GiB"),
        (-GIB, "-1 GiB"),
        (TIB, "1 TiB"),
    ],
)
def test_a_size_is_written_for_people(size_bytes, text):
    assert format_memory(size_bytes) == text


@given(st.integers(1, MEMORY_BYTES_MAX))
def test_what_is_written_is_read_back_nearly(size_bytes):
    assert abs(parse_memory(format_memory(size_bytes)) - size_bytes) <= max(size_bytes * 0.06, 1)


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_a_value_error(text):
    with contextlib.suppress(ValueError):
        assert 1 <= parse_memory(text) <= MEMORY_BYTES_MAX


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("5m", 300),
        ("5 min", 300),
        ("1.5h", 5400),
        ("7d", 604_800),
        ("250ms", 0.25),
        ("3", 3),
        (3, 3),
        (0.5, 0.5),
    ],
)
def test_a_duration_is_read(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5 weeks", "-1s", "nan", float("nan"), float("inf"), -1, "367d", True, "1h30m"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a duration|is out of range"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.012, "12 ms"), (3.21, "3.2 s"), (250, "4m 10s"), (7500, "2h 05m"), (-3, "-3.0 s"), (0, "0 ms")],
)
def test_a_duration_is_written_for_people(seconds, text):
    assert format_duration(seconds) == text
