"""The autoscaler's journal on real stores: what is written, what is only counted, who may write."""

import msgspec

from autoscaler.journal import REPEAT_S, Journal
from manager.core.answers_autoscaler import DecisionNote, ScalingAction, ScalingGroup
from manager.leader import Leadership
from manager.metrics import LEADER
from tests.contract.store_harness import Lab

HOLD = DecisionNote(
    mode="active",
    metrics="",
    groups=(ScalingGroup(group="g", need=1, size=1, target=1, reason="SizeFits", blocked_s=7.0),),
    actions=(),
)


def decided(need: int, *actions: ScalingAction) -> DecisionNote:
    group = msgspec.structs.replace(HOLD.groups[0], need=need)
    return msgspec.structs.replace(HOLD, groups=(group,), actions=actions)


async def _entries(lab: Lab) -> list[DecisionNote]:
    """Oldest first."""
    return [msgspec.json.decode(blob, type=DecisionNote) for _, blob in reversed(await lab.store.journal(100))]


async def _leads(lab: Lab) -> int:
    done, token, _, _ = await lab.store.lead("me", 0, 0, "take", "autoscaler")
    assert done
    return token


async def test_holds_that_are_alike_are_counted_and_told_with_what_follows(lab: Lab) -> None:
    token, journal = await _leads(lab), Journal(lab.store)
    add = ScalingAction("add", "g", ("g-0",), "NeedAboveSize", "done")
    written = [
        await journal.write(token, note, at_s)
        for at_s, note in (
            (0.0, HOLD),
            (5.0, HOLD),
            (10.0, msgspec.structs.replace(HOLD, groups=(msgspec.structs.replace(HOLD.groups[0], blocked_s=2.0),))),
            (15.0, decided(2, add)),
            (20.0, decided(2, add)),
            (25.0, decided(2)),
        )
    ]
    assert written == [True, False, False, True, True, True]
    assert [(note.groups[0].need, len(note.actions), note.repeats) for note in await _entries(lab)] == [
        *((1, 0, 0), (2, 1, 2)),
        *((2, 1, 0), (2, 0, 0)),
    ]


async def test_a_long_hold_is_written_again_after_a_while(lab: Lab) -> None:
    token, journal = await _leads(lab), Journal(lab.store)
    for at_s in (0.0, 5.0, REPEAT_S - 1, REPEAT_S, REPEAT_S + 5):
        await journal.write(token, HOLD, at_s)
    assert [note.repeats for note in await _entries(lab)] == [0, 2]


async def test_who_was_replaced_writes_nothing(lab: Lab) -> None:
    token, journal = await _leads(lab), Journal(lab.store)
    await lab.store.lead("me", token, 0, "resign", "autoscaler")
    done, _, _, _ = await lab.store.lead("other", token, 0, "take", "autoscaler")
    assert done
    await journal.write(token, HOLD, 0.0)
    assert await _entries(lab) == []


async def test_an_autoscaler_that_leads_does_not_pass_for_a_controller_that_does(lab: Lab) -> None:
    LEADER.set(0)
    assert await Leadership(lab.store, "me", 5.0, "autoscaler").step()
    assert LEADER.collect()[0].samples[0].value == 0
    assert await Leadership(lab.store, "me", 5.0).step()
    assert LEADER.collect()[0].samples[0].value == 1
