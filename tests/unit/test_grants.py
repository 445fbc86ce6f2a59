"""A grant travels whole: in a task's annotation and in the report that a node registers with, also between versions."""

import msgspec
import pytest

from manager.core.quantities import GIB
from manager.core.shapes import Grant
from plugins.node.link import LiveSlot, Report, decode_report, encode_report
from plugins.slot import ASSIGNED, Assigned, assigned_of, assignment_of

PLAIN = Grant("a", ("d0",), 4 * GIB)
ALL = Grant("a", ("d0", "d1"), 4 * GIB, 250, 1500, 2 * GIB, True, "llama")


def as_dask_sends(value):
    """Dask's messages turn lists into tuples, and back, as they like."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value))


@pytest.mark.parametrize("grant", [PLAIN, ALL])
def test_an_annotation_has_all_of_the_grant(grant):
    said = {ASSIGNED: as_dask_sends(assignment_of(Assigned("s", grant)))}
    assert assigned_of(said) == Assigned("s", grant)
    said[ASSIGNED]["devices"] = tuple(said[ASSIGNED]["devices"])
    assert assigned_of(said) == Assigned("s", grant)


def test_an_annotation_of_an_older_scheduler_is_read():
    older = {"slot": "s", "node": "a", "devices": ["d0"], "memory_bytes": 4 * GIB}
    assert assigned_of({ASSIGNED: older}) == Assigned("s", PLAIN)
    assert as_dask_sends(assignment_of(Assigned("s", PLAIN))) == older, "and an older worker reads ours"


@pytest.mark.parametrize("annotations", [None, {}, {"gpu": {}}, {ASSIGNED: None}])
def test_what_was_not_placed_has_no_grant(annotations):
    assert assigned_of(annotations) is None


def test_a_report_says_all_of_its_slots_and_of_its_host():
    slots = (LiveSlot("s", ALL), LiveSlot("t", PLAIN))
    labels = (("rack", "a12"), ("zone", "b"))
    report = Report("a", "i1", 3, (), GIB, slots, cpu_milli=64_000, host_memory_bytes=512 * GIB, labels=labels)
    assert decode_report(encode_report(report)) == report


def test_the_report_of_an_older_agent_is_read():
    older = {"type": "reported", "node": "a", "incarnation": "i1", "generation": 1, "devices": [], "reserve_bytes": 0}
    older["slots"] = [{"slot_id": "s", "grant": {"node": "a", "devices": ["d0"], "memory_bytes": 4 * GIB}}]
    report = decode_report(msgspec.json.encode(older))
    assert report is not None
    assert report.slots == (LiveSlot("s", PLAIN),)
    assert (report.cpu_milli, report.host_memory_bytes, report.labels) == (0, 0, ())
