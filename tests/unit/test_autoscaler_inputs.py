"""What the autoscaler believes: readings of metrics, how fresh they are, and what is known of nodes."""

import msgspec
import pytest

from autoscaler.metrics_source import INFEASIBLE, NEED, ROUND, Freshness, NoData, Reading, reading_of, samples_of
from autoscaler.observe import History, Watcher
from autoscaler.policy import Holder, Member, Phase, Sample
from autoscaler.providers.interface import Instance, Listing
from manager.core.lifecycle import Cordon, SlotKind
from manager.core.model import ClusterState, NodeRow, SlotRow
from tests.unit import factories as make

GOOD = [(NEED, {"group": "g"}, 3.0), (ROUND, {"group": "g"}, 17.0), (INFEASIBLE, {"reason": "TooFewDevices"}, 2.0)]


def test_a_whole_reading() -> None:
    assert reading_of(GOOD, ["g"]) == Reading({"g": 3}, {"g": 17.0}, {"TooFewDevices": 2})


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        pytest.param([], "no controller leads", id="empty is no zero"),
        pytest.param(GOOD[:1], "no controller leads", id="partial"),
        pytest.param([(NEED, {"group": "g"}, float("nan")), *GOOD[1:]], "is nan", id="not a number"),
        pytest.param([(NEED, {"group": "g"}, float("inf")), *GOOD[1:]], "is inf", id="endless"),
        pytest.param([(NEED, {"group": "g"}, -1.0), *GOOD[1:]], "is -1", id="below zero"),
        pytest.param([(NEED, {"group": "g"}, 1.5), *GOOD[1:]], "is 1.5", id="no number of nodes"),
        pytest.param([*GOOD, (NEED, {"group": "g"}, 3.0)], "several values", id="two controllers, though they agree"),
    ],
)
def test_what_is_no_reading(samples: list[tuple[str, dict[str, str], float]], says: str) -> None:
    with pytest.raises(NoData, match=says):
        reading_of(samples, ["g"])


def test_groups_that_are_not_ours_are_no_matter() -> None:
    others = [(NEED, {"group": "x"}, 9.0), (NEED, {"group": "x"}, 8.0), ("rocyard_slots", {}, 1.0)]
    assert reading_of([*GOOD, *others], ["g"]).needs == {"g": 3}


def prometheus(**changes: object) -> bytes:
    series = [{"metric": {"__name__": name, **labels}, "value": [1.0, str(value)]} for name, labels, value in GOOD]
    answer: dict[str, object] = {"status": "success", "data": {"resultType": "vector", "result": series}}
    return msgspec.json.encode(answer | changes)


def test_an_answer_of_prometheus_is_read() -> None:
    assert reading_of(samples_of(prometheus()), ["g"]) == reading_of(GOOD, ["g"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"<html>", "cannot be understood", id="no JSON"),
        pytest.param(prometheus(data={"resultType": "matrix", "result": []}), "cannot be understood", id="another kind"),
        pytest.param(prometheus(warnings=["partial response"]), "partial response", id="a warning"),
        pytest.param(b'{"status": "error", "errorType": "bad_data", "error": "parse error"}', "parse error", id="an error"),
        pytest.param(
            prometheus(data={"resultType": "vector", "result": [{"metric": {}, "value": [1, "x"]}]}),
            "cannot be understood",
            id="a value that is none",
        ),
    ],
)
def test_what_is_no_answer_of_prometheus(content: bytes, says: str) -> None:
    with pytest.raises(NoData, match=says):
        samples_of(content)


def test_a_round_is_believed_once_it_was_seen_to_change_and_as_long_as_it_does() -> None:
    fresh = Freshness(stale_s=20.0)

    def believed(mark: float, now_s: float) -> bool:
        try:
            fresh.check(Reading({"g": 1}, {"g": mark}, {}), now_s)
        except NoData:
            return False
        return True

    assert [believed(1, 0), believed(1, 5), believed(2, 10), believed(2, 29), believed(2, 30), believed(3, 35)] == [
        *(False, False, True),
        *(True, False, True),
    ]


def test_a_history_reaches_over_its_window_and_begins_anew_after_a_gap() -> None:
    history = History(window_s=20.0)
    assert history.add(3, 0.0) == (Sample(0.0, 3),)
    for at_s, nodes in ((10.0, 2), (20.0, 1), (30.0, 4)):
        found = history.add(nodes, at_s)
    assert found == (Sample(0.0, 4), Sample(10.0, 1), Sample(20.0, 2))
    assert history.add(None, 40.0) == ()
    assert history.add(1, 50.0) == (Sample(0.0, 1),)


# --- nodes --------------------------------------------------------------------------------------------------------


def row(name: str = "n", **changes: object) -> NodeRow:
    made = make.node_row(name, [192])
    made = msgspec.structs.replace(made, info=msgspec.structs.replace(made.info, group="g"), registered_ms=make.NOW_MS - 60_000)
    return msgspec.structs.replace(made, **changes)


def look(*rows: NodeRow, slots: tuple[SlotRow, ...] = ()) -> ClusterState:
    return ClusterState(make.NOW_MS, (), slots, rows)


def seen(
    state: ClusterState, instance: Instance | None = None, watcher: Watcher | None = None, now_s: float = 0.0
) -> tuple[Member, ...]:
    listing = Listing(group="g", instances=(instance or Instance(name="n", age_s=300.0),))
    return (watcher or Watcher(registration_s=60.0, beat_s=3.0)).members(listing, state, now_s)


@pytest.mark.parametrize(
    ("state", "age_s", "phase"),
    [
        pytest.param(look(), 30.0, Phase.STARTING, id="not registered yet"),
        pytest.param(look(), 61.0, Phase.FAILED, id="not registered in time"),
        pytest.param(look(row()), 300.0, Phase.LIVE, id="registered"),
        pytest.param(look(row(address="", registered_ms=make.NOW_MS - 5000)), 300.0, Phase.STARTING, id="no Dask worker yet"),
        pytest.param(look(row(address="", registered_ms=make.NOW_MS - 61_000)), 300.0, Phase.FAILED, id="nor in time"),
        pytest.param(look(row(fenced=True)), 300.0, Phase.STARTING, id="lost: its time counts from now"),
        pytest.param(look(row(left=True)), 20.0, Phase.STARTING, id="a name that was used before"),
    ],
)
def test_how_far_an_instance_has_come(state: ClusterState, age_s: float, phase: Phase) -> None:
    (member,) = seen(state, Instance(name="n", age_s=age_s))
    assert member.phase is phase


def test_a_lost_node_has_its_time_to_come_back() -> None:
    watcher = Watcher(registration_s=60.0, beat_s=3.0)
    lost = look(row(fenced=True))
    assert [seen(lost, watcher=watcher, now_s=at_s)[0].phase for at_s in (0.0, 59.0, 61.0)] == [
        *(Phase.STARTING, Phase.STARTING),
        Phase.FAILED,
    ]
    assert seen(look(row()), watcher=watcher, now_s=62.0)[0].phase is Phase.LIVE
    assert seen(lost, watcher=watcher, now_s=63.0)[0].phase is Phase.STARTING


@pytest.mark.parametrize(
    ("slot", "busy"),
    [
        pytest.param(make.opened("s", "q", "n", "d0"), True, id="it runs something"),
        pytest.param(make.opened("s", "q", "n", "d0", running=0), True, id="it has just opened"),
        pytest.param(make.opened("s", "q", "n", "d0", idle_s=9.0), False, id="it is idle"),
        pytest.param(
            msgspec.structs.replace(make.opened("s", "q", "n", "d0", idle_s=9.0), kind=SlotKind.DIRECT), True, id="a Dask task"
        ),
    ],
)
def test_who_works(slot: SlotRow, busy: bool) -> None:
    (member,) = seen(look(row(), slots=(slot,)))
    assert (member.busy, member.empty) == (busy, False)
    assert member.idle_s == (0.0 if busy else 9.0)


def test_idle_time_is_watched_where_no_slot_tells_it() -> None:
    watcher = Watcher(registration_s=60.0, beat_s=3.0)
    state, working = look(row()), look(row(), slots=(make.opened("s", "q", "n", "d0"),))
    assert [seen(state, watcher=watcher, now_s=at_s)[0].idle_s for at_s in (0.0, 30.0)] == [0.0, 30.0]
    assert seen(working, watcher=watcher, now_s=40.0)[0].idle_s == 0.0
    assert seen(state, watcher=watcher, now_s=50.0)[0].idle_s == 0.0


@pytest.mark.parametrize(
    ("by", "holder"), [("operator", Holder.OPERATOR), ("autoscaler", Holder.AUTOSCALER), ("", Holder.OPERATOR)]
)
def test_who_has_cordoned(by: str, holder: Holder) -> None:
    (member,) = seen(look(row(cordon=Cordon.DRAIN, cordon_by=by, cordon_ms=make.NOW_MS - 5000)))
    assert (member.cordoned_by, member.cordoned_s) == (holder, 5.0)


def test_a_node_that_its_provider_does_not_know_counts_while_it_beats() -> None:
    watcher = Watcher(registration_s=60.0, beat_s=3.0)

    def names(beat: int, now_s: float) -> list[tuple[str, bool]]:
        state = look(row(), row("own", beat=beat))
        return [(member.name, member.listed) for member in seen(state, watcher=watcher, now_s=now_s)]

    assert names(1, 0.0) == [("n", True), ("own", False)]
    assert names(2, 5.0) == [("n", True), ("own", False)]
    assert names(2, 12.0) == [("n", True)], "it was taken away"
