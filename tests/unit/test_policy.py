"""The autoscaler's decision as tables: what is seen, what is done, why."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.policy import (
    Action,
    Add,
    Decision,
    Drain,
    GroupView,
    Hold,
    Holder,
    Limits,
    Member,
    Observation,
    Phase,
    Reason,
    Remove,
    Sample,
    Uncordon,
    backoff_s,
    decide,
)

LIMITS = Limits(
    up_window_s=0.0,
    down_window_s=120.0,
    tolerance=0.1,
    step_up_max=4,
    step_down_max=4,
    workers_max=1000,
    settle_s=20.0,
)
LONG = tuple(Sample(age_s, 0) for age_s in range(0, 130, 10))


def live(name: str, **changes: object) -> Member:
    return msgspec.structs.replace(Member(name=name, idle_s=60.0), **changes)


def busy(name: str) -> Member:
    return live(name, busy=True, empty=False, idle_s=0.0)


def starting(name: str, age_s: float = 5.0) -> Member:
    return Member(name=name, phase=Phase.STARTING, age_s=age_s)


def drained(name: str, cordoned_s: float = 60.0, **changes: object) -> Member:
    return live(name, cordoned_by=Holder.AUTOSCALER, cordoned_s=cordoned_s, **changes)


def samples(*nodes: int) -> tuple[Sample, ...]:
    """Needs, the newest first, ten seconds apart."""
    return tuple(Sample(10.0 * number, need) for number, need in enumerate(nodes))


def flat(need: int) -> tuple[Sample, ...]:
    return tuple(msgspec.structs.replace(sample, nodes=need) for sample in LONG)


def view(need: int | None, *members: Member, **changes: object) -> GroupView:
    known = 0 if need is None else need
    made = GroupView(
        name="g",
        workers_min=0,
        workers_max=10,
        need=need,
        ups=(Sample(0.0, known),),
        downs=() if need is None else flat(need),
        members=members,
        new_names=tuple(f"new-{n}" for n in range(20)),
    )
    return msgspec.structs.replace(made, **changes)


def decided(*views: GroupView, **limits: object) -> Decision:
    return decide(Observation(views), msgspec.structs.replace(LIMITS, **limits))


def actions(group: GroupView, **limits: object) -> list[Action]:
    return list(decided(group, **limits).actions)


FIVE = tuple(live(f"n{n}") for n in range(5))
TEN = tuple(live(f"n{n}") for n in range(10))


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        pytest.param(view(0), Hold("g", Reason.SIZE_FITS), id="nothing is needed and nothing is there"),
        pytest.param(view(2), Add("g", ("new-0", "new-1"), Reason.NEED_ABOVE_SIZE), id="from zero"),
        pytest.param(view(9), Add("g", tuple(f"new-{n}" for n in range(4)), Reason.NEED_ABOVE_SIZE), id="no more than a step"),
        pytest.param(
            view(10, *FIVE), Add("g", tuple(f"new-{n}" for n in range(5)), Reason.NEED_ABOVE_SIZE), id="or than there are"
        ),
        pytest.param(view(3, *FIVE[:2], starting("s")), Hold("g", Reason.SIZE_FITS), id="who starts counts"),
        pytest.param(view(20, *TEN), Hold("g", Reason.AT_MAXIMUM), id="at its maximum"),
        pytest.param(view(0, workers_min=1), Add("g", ("new-0",), Reason.BELOW_MINIMUM), id="below its minimum"),
        pytest.param(
            view(None, workers_min=1), Add("g", ("new-0",), Reason.BELOW_MINIMUM), id="below it, and nothing is known"
        ),
        pytest.param(
            view(10, *TEN[:9], live("c", cordoned_by=Holder.OPERATOR, cordoned_s=60.0)),
            Hold("g", Reason.AT_MAXIMUM),
            id="cordoned ones count",
        ),
        pytest.param(
            view(1, live("c", cordoned_by=Holder.OPERATOR, cordoned_s=60.0)),
            Add("g", ("new-0",), Reason.NEED_ABOVE_SIZE),
            id="and hold no work",
        ),
        pytest.param(
            view(1, live("c", cordoned_by=Holder.OPERATOR, cordoned_s=3.0)),
            Hold("g", Reason.UP_WINDOW),
            id="a need from before the cordon counts on it",
        ),
        pytest.param(view(3, members=None), Hold("g", Reason.PROVIDER_UNAVAILABLE), id="no listing: nothing"),
        pytest.param(view(3, live("a"), blocked_s=5.0), Hold("g", Reason.BACKING_OFF), id="after a start that failed"),
        pytest.param(
            view(5, *FIVE[:4], ups=(Sample(0.0, 5),)), Add("g", ("new-0",), Reason.NEED_ABOVE_SIZE), id="one more of four"
        ),
    ],
)
def test_up(group: GroupView, expected: Action) -> None:
    assert actions(group) == [expected]


def test_a_need_within_tolerance_changes_nothing_either_way() -> None:
    twenty = tuple(live(f"n{n:02d}") for n in range(20))
    for need in (18, 19, 21, 22):
        assert actions(view(need, *twenty, workers_max=50)) == [Hold("g", Reason.WITHIN_TOLERANCE)]
    assert isinstance(actions(view(23, *twenty, workers_max=50))[0], Add)
    assert isinstance(actions(view(17, *twenty, workers_max=50))[0], Drain)


def test_bounds_hold_whatever_the_tolerance() -> None:
    nineteen = tuple(live(f"n{n:02d}") for n in range(19))
    assert actions(view(19, *nineteen, workers_min=20, workers_max=50))[0].reason is Reason.BELOW_MINIMUM
    assert actions(view(19, *nineteen, workers_max=18))[0].reason is Reason.ABOVE_MAXIMUM


def test_a_need_must_last_for_the_up_window() -> None:
    short = view(3, ups=samples(3, 3))
    assert actions(short, up_window_s=20.0) == [Hold("g", Reason.UP_WINDOW)]
    dipped = view(3, ups=samples(3, 0, 3))
    assert actions(dipped, up_window_s=20.0) == [Hold("g", Reason.UP_WINDOW)]
    assert actions(view(3, ups=samples(3, 2, 4)), up_window_s=20.0) == [Add("g", ("new-0", "new-1"), Reason.NEED_ABOVE_SIZE)]


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        pytest.param(view(0, *FIVE, downs=samples(0, 0, 0)), Reason.DOWN_WINDOW, id="not watched for a window"),
        pytest.param(view(0, *FIVE, downs=(*samples(0, 0, 5), *LONG[3:])), Reason.DOWN_WINDOW, id="higher within it"),
        pytest.param(view(0, *FIVE, since_up_s=60.0), Reason.DOWN_WINDOW, id="up within it"),
        pytest.param(view(None, *FIVE), Reason.METRICS_UNKNOWN, id="metrics unknown"),
        pytest.param(view(None, *FIVE, truth=0), Reason.METRICS_UNKNOWN, id="the queue's truth never lowers"),
        pytest.param(view(0, *(busy(m.name) for m in FIVE)), Reason.ALL_BUSY, id="all work"),
        pytest.param(view(0, *(live(m.name, listed=False) for m in FIVE)), Reason.ALL_BUSY, id="none that is listed"),
    ],
)
def test_what_holds_a_group_that_is_too_large(group: GroupView, reason: Reason) -> None:
    assert actions(group) == [Hold("g", reason)]


def test_the_highest_need_of_the_window_is_what_stays() -> None:
    group = view(1, *FIVE, downs=(*samples(1, 3, 2), *(Sample(10.0 * n, 1) for n in range(3, 13))))
    assert actions(group) == [Drain("g", ("n0", "n1"), Reason.NEED_BELOW_SIZE)]


def test_without_metrics_the_queue_may_raise() -> None:
    group = view(None, live("a"), truth=3, ups=(Sample(0.0, 3),))
    assert actions(group) == [Add("g", ("new-0", "new-1"), Reason.NEED_ABOVE_SIZE)]


def test_who_starts_goes_before_who_is_idle_and_who_works_never() -> None:
    members = (
        live("idle-short", idle_s=10.0),
        live("idle-long", idle_s=500.0),
        starting("old", 50.0),
        starting("young", 5.0),
        busy("b"),
    )
    assert actions(view(4, *members)) == [Remove("g", ("young",), Reason.NEED_BELOW_SIZE, ("young",))]
    assert actions(view(2, *members)) == [
        Remove("g", ("young", "old"), Reason.NEED_BELOW_SIZE, ("young", "old")),
        Drain("g", ("idle-long",), Reason.NEED_BELOW_SIZE),
    ]
    everything = actions(view(0, *members), step_down_max=10)
    assert "b" not in {name for action in everything for name in getattr(action, "names", ())}


def test_no_more_than_a_step_goes_at_once() -> None:
    (drain,) = actions(view(0, *TEN))
    assert isinstance(drain, Drain)
    assert len(drain.names) == LIMITS.step_down_max


@pytest.mark.parametrize(
    ("member", "gone"),
    [
        pytest.param(drained("a"), True, id="empty and settled"),
        pytest.param(drained("a", cordoned_s=5.0), False, id="something may still open there"),
        pytest.param(drained("a", empty=False), False, id="a slot is open"),
        pytest.param(drained("a", busy=True, empty=False), False, id="it works"),
        pytest.param(live("a", cordoned_by=Holder.OPERATOR, cordoned_s=500.0), False, id="an operator's"),
    ],
)
def test_a_drained_node_ends_once_it_is_empty(member: Member, gone: bool) -> None:
    expected: Action = Remove("g", ("a",), Reason.DRAINED) if gone else Hold("g", Reason.SIZE_FITS)
    assert actions(view(0, member))[0] == expected


def test_without_metrics_even_a_drained_node_stays() -> None:
    assert actions(view(None, drained("a"))) == [Hold("g", Reason.METRICS_UNKNOWN)]


def test_a_drain_is_lifted_before_anything_is_started() -> None:
    members = (live("n"), drained("idle", 5.0), drained("works", 90.0, busy=True, empty=False))
    assert actions(view(2, *members)) == [Uncordon("g", ("works",), Reason.WANTED_AGAIN)]
    assert actions(view(5, *members)) == [
        Uncordon("g", ("works", "idle"), Reason.WANTED_AGAIN),
        Add("g", ("new-0", "new-1"), Reason.NEED_ABOVE_SIZE),
    ]


def test_who_has_not_registered_is_ended_and_not_replaced_in_the_same_breath() -> None:
    failed = Member(name="f", phase=Phase.FAILED, age_s=90.0)
    assert actions(view(2, live("a"), failed)) == [Remove("g", ("f",), Reason.NOT_REGISTERED, ("f",))]


# --- where only the last ones can go ------------------------------------------------------------------------------


def test_of_an_ordered_group_exactly_the_last_ones_are_drained_though_they_work() -> None:
    members = (live("p-0"), live("p-1"), live("p-2"), busy("p-3"))
    assert actions(view(2, *members, ordered=True)) == [Drain("g", ("p-3", "p-2"), Reason.NEED_BELOW_SIZE)]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        pytest.param(
            (live("p-0"), drained("p-1"), drained("p-2")), Remove("g", ("p-1", "p-2"), Reason.DRAINED), id="both are empty"
        ),
        pytest.param(
            (live("p-0"), drained("p-1"), drained("p-2", busy=True, empty=False)),
            Hold("g", Reason.SIZE_FITS),
            id="the last one works",
        ),
        pytest.param(
            (live("p-0"), drained("p-1", busy=True, empty=False), drained("p-2")),
            Remove("g", ("p-2",), Reason.DRAINED),
            id="the one before works",
        ),
        pytest.param(
            (live("p-0"), Member(name="p-1", phase=Phase.FAILED)),
            Remove("g", ("p-1",), Reason.NOT_REGISTERED, ("p-1",)),
            id="the last one failed",
        ),
        pytest.param(
            (Member(name="p-0", phase=Phase.FAILED), live("p-1")),
            Hold("g", Reason.SIZE_FITS),
            id="one that failed in the middle stays",
        ),
        pytest.param(
            (live("p-0"), drained("p-1"), Member(name="p-2", phase=Phase.FAILED)),
            Remove("g", ("p-1", "p-2"), Reason.NOT_REGISTERED, ("p-2",)),
            id="one change for both",
        ),
    ],
)
def test_of_an_ordered_group_only_the_tail_ends(members: tuple[Member, ...], expected: Action) -> None:
    assert actions(view(1, *members, ordered=True)) == [expected]


def test_an_ordered_group_waits_for_an_operator_at_its_end() -> None:
    members = (live("p-0"), live("p-1"), live("p-2", cordoned_by=Holder.OPERATOR))
    assert actions(view(0, *members, ordered=True)) == [Hold("g", Reason.OPERATOR_CORDON)]


def test_of_an_ordered_group_the_lowest_are_wanted_again_first() -> None:
    members = (live("p-0"), drained("p-1"), drained("p-2", busy=True, empty=False))
    assert actions(view(2, *members, ordered=True))[0] == Uncordon("g", ("p-1",), Reason.WANTED_AGAIN)


# --- all groups together --------------------------------------------------------------------------------------------


def test_groups_share_what_all_may_have() -> None:
    first, second = view(4, name="a"), view(4, name="b")
    decision = decided(second, first, workers_max=5)
    assert [(action.group, len(action.names)) for action in decision.actions if isinstance(action, Add)] == [("a", 4), ("b", 1)]


@pytest.mark.parametrize(("failures", "expected"), [(0, 0), (1, 10), (2, 20), (3, 40), (6, 300), (500, 300)])
def test_pauses_double_up_to_their_bound(failures: int, expected: float) -> None:
    assert backoff_s(failures, 10.0, 300.0) == expected


MEMBERS = st.lists(
    st.builds(
        Member,
        name=st.uuids().map(str),
        listed=st.booleans(),
        phase=st.sampled_from(Phase),
        busy=st.booleans(),
        empty=st.booleans(),
        idle_s=st.floats(0, 1000),
        cordoned_by=st.sampled_from(Holder),
        cordoned_s=st.floats(0, 1000),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    members=MEMBERS,
    need=st.none() | st.integers(0, 15),
    truth=st.none() | st.integers(0, 15),
    low=st.integers(0, 5),
    high=st.integers(5, 10),
    ordered=st.booleans(),
    total=st.integers(0, 15),
)
def test_what_never_happens(
    members: list[Member], need: int | None, truth: int | None, low: int, high: int, ordered: bool, total: int
) -> None:
    known = max((n for n in (need, truth) if n is not None), default=0)
    group = view(need, *members, truth=truth, workers_min=low, workers_max=high, ordered=ordered, ups=(Sample(0.0, known),))
    by_name = {member.name: member for member in members}
    order = [member.name for member in members if member.listed]
    added = 0
    for action in actions(group, workers_max=total):
        match action:
            case Add():
                added += len(action.names)
            case Remove():
                for name in action.names:
                    member = by_name[name]
                    assert member.listed
                    assert member.cordoned_by is not Holder.OPERATOR
                    assert name in action.unregistered or (member.cordoned_by is Holder.AUTOSCALER and not member.busy)
                    assert need is not None or member.phase is Phase.FAILED
                if ordered:
                    assert set(order[-len(action.names) :]) == set(action.names)
            case Drain():
                assert need is not None
                assert all(by_name[name].cordoned_by is Holder.NOBODY for name in action.names)
                assert ordered or not any(by_name[name].busy for name in action.names)
            case Uncordon():
                assert all(by_name[name].cordoned_by is Holder.AUTOSCALER for name in action.names)
            case Hold():
                pass
    if added:
        assert len(members) + added <= min(high, total)
