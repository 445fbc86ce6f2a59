"""The mix of requests: learned by one, told in bounds, and the same wherever it has come to."""

import msgspec
import pytest

from manager.core.ahead import Setup, with_mix
from manager.core.index import index_of
from manager.core.mix import CLASSES_TOLD_MAX, NO_MIX, Mix, decode_mix, encode_mix, mix_from, mix_of
from manager.core.news import decode_news, encode_news, news_of
from manager.core.outlook import COUNTED_MAX, DemandCounter
from manager.core.placement import NO_DEMAND, place
from manager.core.policies import BEST_FIT, DEFAULT_POLICY
from manager.core.snapshot import decode_snapshot, encode_snapshot, replay, snapshot_of
from plugins.ledger import Ledger, SlotRequest
from tests.unit import factories as make

SMALL, LARGE, PAIR = make.need(8), make.need(40, architectures=("cdna3",)), make.need(24, 2)


def counted(*needs, count: int = 60) -> DemandCounter:
    counter = DemandCounter()
    for number in range(count):
        counter.note(needs[number % len(needs)])
    return counter


def test_what_is_told_is_what_is_expected_to_the_last_digit():
    counter = counted(SMALL, LARGE, PAIR, SMALL)
    again = decode_mix(encode_mix(counter.told))
    assert again == counter.told
    assert again.shares == counter.demand.shares
    assert mix_from(msgspec.to_builtins(counter.told)) == counter.told


def test_the_revision_stands_for_what_is_said():
    told = counted(SMALL, LARGE).told
    assert told.revision
    assert counted(SMALL, LARGE).told.revision == told.revision, "another count of the same is news"
    assert counted(SMALL, PAIR).told.revision != told.revision
    assert mix_of(told.shares, told.counted + 1).revision != told.revision
    assert DemandCounter().told.revision == NO_MIX.revision == ""


def test_too_many_classes_are_told_without_the_rarest():
    shares = [(make.need(number + 1), 1.0 + number % 7 + number / 1000) for number in range(CLASSES_TOLD_MAX + 50)]
    told = mix_of(shares, 1000).shares
    assert len(told) == CLASSES_TOLD_MAX
    assert min(share for _, share in told) > max(share for need, share in shares if (need, share) not in told)
    assert mix_of(shares[:CLASSES_TOLD_MAX], 1).shares == tuple(shares[:CLASSES_TOLD_MAX]), "in the order that placement sees"


@pytest.mark.parametrize("raw", [b"", b"{", b'{"revision":1}', b'{"shares":[[{"memory_bytes":1,"later":2},1.0]]}'])
def test_what_cannot_be_read_is_no_mix(raw):
    assert decode_mix(raw) == NO_MIX


@pytest.mark.parametrize("plain", [None, {"revision": 1}, {"shares": [[{"memory_bytes": 1, "later": 2}, 1.0]]}, "mix"])
def test_nothing_or_nonsense_from_the_scheduler_is_no_news(plain):
    assert mix_from(plain) is None


def test_a_counter_goes_on_from_what_was_learned_before():
    before = counted(SMALL, LARGE)
    fresh = DemandCounter()
    fresh.note(PAIR)
    fresh.resume(before.told)
    assert fresh.told is before.told
    assert fresh.demand.shares == before.demand.shares
    for number in range(before.told.counted):
        fresh.note((SMALL, LARGE)[number % 2])
    assert fresh.told is before.told, "more of the same is no news: the counts were taken over"
    for _ in range(COUNTED_MAX):
        fresh.note(PAIR)
    assert dict(fresh.demand.shares)[PAIR] > 0.8


def test_a_counter_that_has_learned_something_keeps_it():
    counter = counted(SMALL)
    told, demand = counter.told, counter.demand
    counter.resume(counted(PAIR).told)
    counter.resume(NO_MIX)
    assert (counter.told, counter.demand) == (told, demand)


def test_slots_that_a_new_scheduler_is_told_of_again_are_no_new_requests():
    ledger = Ledger()
    for number in range(20):
        ledger.ask(SlotRequest(f"old{number}", make.shape(4), node="a"), 0.0)
    assert ledger.mix.told == NO_MIX
    for number in range(20):
        ledger.ask(SlotRequest(f"new{number}", make.shape(8)), 0.0)
    assert dict(ledger.mix.told.shares) == {make.need(8): 1.0}


def test_the_news_have_the_revision_always_and_the_mix_where_it_is_asked_for():
    state = msgspec.structs.replace(make.state((), (), {"a": [24]}), mix=counted(SMALL).told)
    plain = decode_news(encode_news(news_of(state)))
    assert (plain.mix_known, plain.mix) == (state.mix.revision, NO_MIX)
    full = decode_news(encode_news(news_of(state, with_mix=True)))
    assert full.mix == state.mix


def where(mix: Mix) -> str:
    """Where a request for one device goes, of a node with two free ones and one with three, if the mix is known."""
    state = make.state((), (), {"pair": [24, 24], "three": [24, 24, 24]})
    setup = with_mix(Setup(limits=make.LIMITS, policy=DEFAULT_POLICY), mix)
    return place(make.need(24), index_of(state), setup.policy, setup.demand).grant.node  # type: ignore[union-attr]


def test_the_mix_decides_where_a_plan_and_a_replay_place():
    pairs = counted(make.need(24, 2, exclusive=True)).told
    assert where(NO_MIX) != where(pairs), "this mix must matter here, or nothing is tested"
    queues = [make.queue("q", make.shape(24), 1)]
    state = msgspec.structs.replace(make.state(queues, (), {"pair": [24, 24], "three": [24, 24, 24]}), mix=pairs)
    setup = with_mix(Setup(limits=make.LIMITS, policy=DEFAULT_POLICY), state.mix)
    snapshot = decode_snapshot(encode_snapshot(snapshot_of(state, setup)))
    assert (snapshot.demand, snapshot.state.mix) == (pairs.shares, NO_MIX)
    (step,) = (step for step in replay(snapshot, DEFAULT_POLICY).steps if step.what == "open")
    assert step.node == where(pairs)


def test_a_setup_forgets_a_mix_that_is_gone():
    setup = with_mix(Setup(limits=make.LIMITS, policy=BEST_FIT), counted(SMALL).told)
    assert with_mix(setup, NO_MIX).demand is NO_DEMAND
