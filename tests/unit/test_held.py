"""What waits stands in order of priority, then of coming; a class of which the first does not fit is tried no further."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from plugins.held import Held


def held(*requests):
    """Each is (name, priority, class)."""
    made = Held()
    for number, (name, priority, kind) in enumerate(requests):
        made.push(name, (priority,), kind, float(number))
    return made


def served(made, fits):
    """Who is placed in one round, and who was tried: `fits` says of a name whether there is room."""
    placed, tried = [], []
    following = made.round()
    while (name := following.next()) is not None:
        tried.append(name)
        if fits(name):
            made.discard(name)
            placed.append(name)
            following.placed()
    return placed, tried


def test_priority_decides_across_classes_and_then_who_came_first():
    made = held(("a", 0, "x"), ("b", -1, "y"), ("c", 0, "y"), ("d", -2, "x"))
    assert list(made) == ["d", "b", "a", "c"]
    assert served(made, lambda _: True)[0] == ["d", "b", "a", "c"]
    assert len(made) == 0
    assert made.kinds() == []


def test_of_a_class_that_does_not_fit_one_is_tried_and_others_pass():
    made = held(*((f"large{n}", 0, "large") for n in range(1000)), ("small", 5, "small"))
    assert served(made, lambda name: name == "small") == (["small"], ["large0", "small"])
    assert len(made) == 1000


def test_more_room_in_the_middle_of_a_round_lets_the_blocked_be_tried_again():
    made = held(("a", 0, "x"), ("b", 1, "y"))
    following = made.round()
    assert following.next() == "a"
    assert following.next() == "b"
    made.discard("b")
    following.placed()
    assert following.next() is None
    following.again()
    assert following.next() == "a"
    assert following.next() is None


def test_who_changes_class_keeps_its_place_in_time():
    made = held(("a", 0, "x"), ("b", 0, "x"))
    made.push("a", (0,), "alone", 9.0)
    made.push("a", (0,), "x", 9.0)
    assert list(made) == ["a", "b"]
    assert {waiting.kind: (waiting.count, waiting.since_s) for waiting in made.waiting()} == {"x": (2, 1.0)}
    assert (made.before("a"), made.before("b")) == (0, 1)
    made.discard("a")
    made.push("a", (0,), "x", 9.0)
    assert list(made) == ["b", "a"], "who comes again comes last"


def test_what_is_gone_takes_no_room_for_long():
    made = held(("stays", 0, "x"))
    for number in range(10_000):
        made.push(f"n{number}", (1,), "x", 0.0)
        made.discard(f"n{number}")
    assert len(made._classes["x"].heap) < 200
    assert list(made) == ["stays"]


def test_nobody_is_discarded_twice():
    made = held(("a", 0, "x"))
    made.discard("stranger")
    made.discard("a")
    made.discard("a")
    assert ("a" in made, made.round().next(), made.first("x")) == (False, None, None)


names = st.sampled_from([f"n{number}" for number in range(8)])
events = st.one_of(
    st.tuples(st.just("push"), names, st.integers(-2, 2), st.sampled_from("xyz")),
    st.tuples(st.just("discard"), names),
    st.tuples(st.just("round"), st.integers(0, 5)),
)


@given(st.lists(events, max_size=60))
def test_it_is_as_a_sorted_list_would_be(history):
    made, model, orders = Held(), {}, iter(range(1000))
    for event in history:
        match event:
            case "push", name, priority, kind:
                made.push(name, (priority,), kind, 0.0)
                model[name] = (priority, model[name][1] if name in model else next(orders), kind)
            case "discard", name:
                made.discard(name)
                model.pop(name, None)
            case "round", room:
                expected = sorted(model, key=lambda name: model[name][:2])[:room]
                placed, _ = served(made, lambda name, expected=expected: name in expected)
                assert placed == expected
                for name in placed:
                    del model[name]
        assert list(made) == sorted(model, key=lambda name: model[name][:2])


@pytest.mark.parametrize("count", [10_000])
def test_a_round_over_many_that_do_not_fit_looks_at_one_of_each_class(count):
    made = held(*((f"n{number}", number % 7, number % 3) for number in range(count)))
    assert len(served(made, lambda _: False)[1]) == 3
