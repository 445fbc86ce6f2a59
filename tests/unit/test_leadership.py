"""Leadership by observed change: one leader at a time, on any clocks, and a silent one is replaced after one term."""

import random

import pytest

from manager.core.errors import StoreUnavailable
from manager.core.leadership import GIVE_WAY_S_MAX, BeatWatch, GivingWay
from manager.leader import TRUST_RATIO, Leadership

TERM_S = 10.0


class FakeTerm:
    """The store's one record of leadership, as its function `lead` keeps it; can be told to be away, or slow."""

    def __init__(self):
        self.token = 0
        self.beat = 0
        self.holder = ""
        self.away = False
        self.delays = {}  # holder → what to do before its call takes effect

    async def lead(self, holder, token, beat, step, role):
        if self.away:
            raise StoreUnavailable
        self.delays.get(holder, lambda: None)()
        done = False
        if step == "take" and self.token == token and (self.beat == beat or not self.holder):
            self.token, self.beat, self.holder, done = self.token + 1, 0, holder, True
        elif self.token == token and self.holder == holder and step in {"renew", "resign"}:
            done = True
            if step == "renew":
                self.beat += 1
            else:
                self.holder = ""
        return done, self.token, self.beat, self.holder


class Clock:
    def __init__(self, now_s=1000.0):
        self.now_s = now_s

    def __call__(self):
        return self.now_s


def done(coroutine):
    """What a coroutine that waits for nothing returns: no event loop is needed."""
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    return ended.value.value


def candidate(store, name, clock=None):
    return Leadership(store, name, TERM_S, clock=clock or Clock())


def step(leader, seconds=0.0):
    leader.clock.now_s += seconds
    return done(leader.step())


def test_the_first_candidate_leads_at_once():
    assert step(candidate(FakeTerm(), "a"))


def test_a_second_candidate_waits_while_the_first_beats():
    store, clock = FakeTerm(), Clock()
    first, second = candidate(store, "a", clock), candidate(store, "b", clock)
    assert step(first)
    for _ in range(20):
        assert step(first, 2.0)
        assert not step(second)


def test_a_silent_leader_is_replaced_after_one_term_and_no_sooner():
    store, clock = FakeTerm(), Clock()
    first, second = candidate(store, "a", clock), candidate(store, "b", clock)
    step(first)
    assert not step(second)
    assert not step(second, TERM_S - 0.1)
    assert not first.leads, "it stopped trusting itself before anybody could replace it"
    assert step(second, 0.1)
    assert not step(first)
    assert (store.token, store.holder) == (2, "b")


def test_a_leader_that_resigns_is_replaced_at_once():
    store = FakeTerm()
    first = candidate(store, "a")
    step(first)
    done(first.resign())
    assert not first.leads
    assert step(candidate(store, "b"))


def test_a_leader_without_store_trusts_itself_for_a_part_of_the_term_only():
    store = FakeTerm()
    leader = candidate(store, "a")
    step(leader)
    store.away = True
    assert step(leader, TERM_S * TRUST_RATIO - 0.1)
    assert not step(leader, 0.2)
    store.away = False
    assert not step(leader), "its old term runs out first, on its own clock"
    assert step(leader, TERM_S)
    assert leader.token == 2


def test_trust_counts_from_the_start_of_the_renewal():
    store, clock = FakeTerm(), Clock()
    leader = candidate(store, "a", clock)
    step(leader)

    def slow():
        clock.now_s += 5.0

    store.delays["a"] = slow
    assert step(leader, 1.0)
    clock.now_s += TERM_S * TRUST_RATIO - 5.0 - 0.01
    assert leader.leads
    clock.now_s += 0.02
    assert not leader.leads


def test_a_slow_look_does_not_make_the_leader_look_silent_for_longer():
    """The holder may have renewed until the answer came, so its silence counts from the answer."""
    store = FakeTerm()
    first, second = candidate(store, "a"), candidate(store, "b")
    step(first)

    def slow():
        second.clock.now_s += 3.0

    store.delays["b"] = slow
    assert not step(second)
    assert not step(second, TERM_S - 1.0)
    del store.delays["b"]
    assert step(second, TERM_S)


def test_two_candidates_that_take_at_once_make_one_leader():
    store, clock = FakeTerm(), Clock()
    both = [candidate(store, name, clock) for name in "ab"]
    for leader in both:
        step(leader)
    assert [leader.leads for leader in both].count(True) == 1


def test_resigning_without_a_store_is_no_error():
    store = FakeTerm()
    leader = candidate(store, "a")
    step(leader)
    store.away = True
    done(leader.resign())
    assert not leader.leads


@pytest.mark.parametrize("seed", range(20))
def test_never_two_leaders_whatever_stalls(seed):
    """Processes stall, the store goes away and comes back; clocks differ by an offset, as monotonic clocks do."""
    chance = random.Random(seed)
    store = FakeTerm()
    candidates = [candidate(store, name, Clock(chance.uniform(0, 1e6))) for name in "abc"]
    led = 0
    for _ in range(600):
        seconds = chance.choice([0.5, 1.0, 2.0, 2.0, 9.0])
        for leader in candidates:
            leader.clock.now_s += seconds
        store.away = chance.random() < 0.1
        for leader in chance.sample(candidates, chance.randint(0, 3)):
            if chance.random() < 0.02:
                done(leader.resign())
            else:
                done(leader.step())
            leading = [each.holder for each in candidates if each.leads]
            assert len(leading) <= 1, f"seed {seed}: {leading}"
            led += len(leading)
    assert led > 0


# --- beats ----------------------------------------------------------------------------------------------------------


def silent(watch, beat, now_s, name="n"):
    """What a look of no duration finds."""
    return watch.silent_s(name, beat, now_s, now_s)


def test_a_beat_that_changes_is_never_silent():
    watch = BeatWatch()
    assert [silent(watch, beat, beat * 100.0) for beat in range(5)] == [0.0] * 5


def test_silence_is_counted_from_the_first_look_at_a_beat():
    watch = BeatWatch()
    assert [silent(watch, 7, now_s) for now_s in (50.0, 53.0, 62.0)] == [0.0, 3.0, 12.0]


def test_an_older_beat_is_a_change_too():
    """A store that was restored, or a node that started anew."""
    watch = BeatWatch()
    silent(watch, 7, 0.0)
    assert silent(watch, 1, 10.0) == 0.0


def test_who_is_forgotten_starts_afresh():
    watch = BeatWatch()
    for name in "ab":
        silent(watch, 1, 0.0, name)
    watch.keep(["a"])
    assert (silent(watch, 1, 5.0, "a"), silent(watch, 1, 5.0, "b")) == (5.0, 0.0)


def test_an_observer_that_stood_still_blames_nobody():
    watch = BeatWatch()
    silent(watch, 1, 0.0)
    silent(watch, 1, 3.0)
    watch.forgive(60.0)  # it looked at 3 and next at 63
    assert silent(watch, 1, 63.0) == 3.0


def test_a_look_during_which_the_observer_stood_still_blames_nobody():
    """Its answer lay there for a minute: what it says of beats may be as old as the question, or as young as the answer."""
    watch = BeatWatch()
    silent(watch, 1, 0.0)
    assert watch.silent_s("n", 1, asked_s=3.0, answered_s=63.0) == 3.0
    assert watch.silent_s("n", 2, asked_s=63.0, answered_s=123.0) == 0.0
    assert watch.silent_s("n", 2, asked_s=123.5, answered_s=123.5) == 0.5


# --- giving way -----------------------------------------------------------------------------------------------------


def test_who_gives_way_leaves_the_term_to_others_for_a_while():
    store = FakeTerm()
    first, second = candidate(store, "first"), candidate(store, "second")
    assert step(first)
    assert not step(second)
    done(first.give_way(3.0))
    assert not first.leads
    assert not step(first, 1.0)
    assert step(second, 1.0)
    assert not step(first, 2.5)


def test_who_gives_way_to_nobody_leads_again():
    store = FakeTerm()
    first = candidate(store, "first")
    assert step(first)
    done(first.give_way(3.0))
    assert not step(first, 2.9)
    assert step(first, 0.2)


def failing(giving_way, begin_s, seconds, step_s=0.25):
    """When it gives way first, in seconds from `begin_s`; None: not within `seconds`."""
    for turn in range(int(seconds / step_s) + 1):
        if giving_way.fails(begin_s + turn * step_s):
            return turn * step_s
    return None


def test_a_leader_that_fails_gives_way_later_each_time():
    giving_way = GivingWay(15.0)
    waited = []
    now_s = 100.0
    for _ in range(7):
        waited.append(failing(giving_way, now_s, 1000))
        now_s += 2000.0
        giving_way.stopped()
    assert waited == [15.0, 30.0, 60.0, 120.0, 240.0, GIVE_WAY_S_MAX, GIVE_WAY_S_MAX]


def test_what_works_again_or_leads_no_more_counts_anew():
    giving_way = GivingWay(15.0)
    assert failing(giving_way, 0.0, 14.0) is None
    giving_way.works()
    assert failing(giving_way, 14.5, 14.0) is None
    giving_way.stopped()
    assert failing(giving_way, 1000.0, 14.0) is None
    assert failing(giving_way, 1014.0, 14.0) == 1.0
    giving_way.works()
    assert failing(giving_way, 2000.0, 60.0) == 15.0  # it has worked since: patience is what it was
