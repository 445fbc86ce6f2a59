"""From the store's flat answers to records, and that both sides name the same fields in the same order."""

import re

import msgspec
import pytest

from manager.core.devices import Device
from manager.core.lifecycle import SlotFlag, SlotStatus, TaskStatus
from manager.core.model import DeviceUse, NodeInfo, TaskSpec
from manager.core.quantities import GIB
from manager.core.shapes import Grant, Resources, Shape, encode_shape
from manager.store import rows
from manager.store.schema import library_source

LIBRARY = library_source()
SPEC = TaskSpec("echo", msgspec.Raw(b'{"x":1}'), Resources(memory_bytes=GIB))
SHAPE = Shape("red", "env", GIB)
INFO = NodeInfo(hostname="h", pid=1, source="simulated", version="1")


def lua_fields(table: str) -> list[str]:
    found = re.search(rf"local {table} = \{{(.*?)\}}", LIBRARY, re.DOTALL)
    assert found is not None
    return re.findall(r"'(\w+)'", found[1])


def task_row(**values: bytes) -> list[bytes | None]:
    known = {"state": b"QUEUED", "attempt": b"0", "created": b"1", **values}
    return [known.get(field) for field in rows.TASK_FIELDS]


def look(queues=(), slots=(), nodes=(), refused=(), dask=(b"", b"")):
    return rows.state([1, list(queues), list(slots), list(nodes), list(refused), list(dask), [], b""])


def test_a_task_that_is_not_there_is_none():
    assert rows.task("x", [None] * len(rows.TASK_FIELDS)) is None


def test_a_fresh_task():
    record = rows.task("x", task_row(tenant=b"red", score=b"175921860444161", spec=msgspec.json.encode(SPEC)))
    assert record is not None
    assert (record.status, record.tenant, record.score, record.spec) == (TaskStatus.QUEUED, "red", 175921860444161, SPEC)
    assert (record.started_ms, record.result, record.error, record.cancel_requested) == (None, None, None, False)


def test_an_ended_task():
    error = b'{"type":"ValueError","message":"no","later":1}'
    record = rows.task("x", task_row(state=b"FAILED", attempt=b"3", failures=b"2", started=b"", finished=b"9", error=error))
    assert record is not None
    assert (record.attempt, record.failures, record.started_ms, record.finished_ms) == (3, 2, None, 9)
    assert record.error is not None
    assert record.error.message == "no"


@pytest.mark.parametrize("empty", [b"", None])
def test_an_error_that_was_taken_away_is_none(empty: bytes | None):
    row = task_row()
    row[rows.TASK_FIELDS.index("error")] = empty
    record = rows.task("x", row)
    assert record is not None
    assert record.error is None


def test_a_listed_task_has_the_fields_of_the_library_in_its_order():
    values = {"state": b"RUNNING", "function": b"echo", "attempt": b"2", "node": b"n1", "created": b"5", "losses": b"1"}
    record = rows.listed("red", [b"x", *(values.get(field, b"") for field in lua_fields("LIST_FIELDS"))])
    assert (record.task_id, record.tenant, record.function, record.attempt) == ("x", "red", "echo", 2)
    assert (record.node, record.created_ms, record.losses, record.failures) == ("n1", 5, 1, 0)


def test_a_slot_has_the_fields_of_the_library_in_its_order():
    values = {"shape": b"sh", "status": b"OPEN", "devices": b"a,b", "flag": b"drain", "idle": b"7", "token": b"3"}
    row = [b"s1", *(values.get(field, b"") for field in lua_fields("SLOT_FIELDS")), 2]
    (slot,) = look(slots=[row]).slots
    assert (slot.slot_id, slot.shape_id, slot.status) == ("s1", "sh", SlotStatus.OPEN)
    assert (slot.devices, slot.flag, slot.idle_ms, slot.token, slot.running) == (("a", "b"), SlotFlag.DRAIN, 7, 3, 2)
    assert slot.opened_ms is None


def test_a_slot_has_all_of_its_grant():
    grant = Grant("n1", ("a", "b"), 3 * GIB, 250, 1500, 2 * GIB, True, "llama")
    names = ("devices", "memory", "share", "cpu", "host", "exclusive", "model")
    written = dict(zip(names, rows.grant_fields(grant), strict=True))
    values = {"node": "n1", "status": "OPEN", **{name: str(value) for name, value in written.items()}}
    row = [b"s1", *(values.get(field, "").encode() for field in lua_fields("SLOT_FIELDS")), 0]
    (slot,) = look(slots=[row]).slots
    assert slot.grant(None) == grant


def test_a_slot_of_an_older_agent_has_what_its_shape_asks_for():
    values = {"node": b"n1", "status": b"OPEN", "devices": b"a"}
    row = [b"s1", *(values.get(field, b"") for field in lua_fields("SLOT_FIELDS")), 0]
    (slot,) = look(slots=[row]).slots
    assert slot.grant(SHAPE) == Grant("n1", ("a",), GIB)
    assert slot.grant(None) is None


@pytest.mark.parametrize(("text", "head"), [(b"", None), (b"100000000", 10**8), (b"1e+8", 10**8)])
def test_the_head_of_a_queue_as_either_server_writes_it(text: bytes, head: int | None):
    row = [b"sh", encode_shape(SHAPE), 4, text, b"", b"12.500", 0, b"", 2 * GIB, b"123", b"", b"1", b"of a later version"]
    (queue,) = look(queues=[row]).queues
    assert (queue.head, queue.depth, queue.run_s, queue.shape) == (head, 4, 0.0125, SHAPE)
    assert (queue.learned_bytes, queue.peak_bytes, queue.out_of_memory) == (2 * GIB, 123, True)


def node_row(uses: bytes = b"", seen: bytes = b"", address: bytes = b"", fenced: bytes = b"") -> list[bytes]:
    values = {"incarnation": b"inc", "beat": b"4", "info": msgspec.json.encode(INFO), "fenced": fenced}
    return [b"n1", *(values.get(field, b"") for field in lua_fields("NODE_FIELDS")), uses, seen, address]


def test_a_node_is_fenced_when_its_present_incarnation_is():
    fenced = [look(nodes=[node_row(fenced=word)]).nodes[0].fenced for word in (b"", b"old", b"inc")]
    assert fenced == [False, False, True]


def test_a_nodes_readings():
    use = DeviceUse(uuid="gpu-0", used_bytes=7, slots={"s1": 5})
    row = node_row(msgspec.json.encode((use,)), b"99", b"tcp://1")
    (node,) = look(nodes=[row]).nodes
    assert (node.uses, node.uses_ms, node.address, node.beat, node.info) == ((use,), 99, "tcp://1", 4, INFO)


@pytest.mark.parametrize("uses", [b"\xff", b"{}", b'[{"uuid":"a"}]', b"[" * 5000])
def test_readings_that_cannot_be_read_are_none(uses: bytes):
    (node,) = look(nodes=[node_row(uses, b"99")]).nodes
    assert (node.uses, node.uses_ms) == ((), None)


def test_a_node_that_never_registered_is_left_out():
    row = node_row()
    row[3] = b""
    assert look(nodes=[row]).nodes == ()


def test_an_event_with_and_without_its_result():
    head = [b"i", b"x", b"s", b"SUCCEEDED", b"a", b"2", b"f", b"9", b"b", b"", b"n", b"n1"]
    event = rows.event([*head, b"r", b"[1]", b"e", b""])
    assert (event.task_id, event.attempt, event.inline, event.result, event.error) == ("x", 2, True, b"[1]", None)
    assert event.started_ms is None
    assert not rows.event(head).inline
    failed = rows.event([*head, b"r", b"", b"e", b'{"type":"E","message":"m"}'])
    assert failed.result is None
    assert failed.error is not None


def test_an_answer_to_open():
    assert rows.opened([b"REFUSED"]).shape is None
    assert rows.opened([b"OK", b"sh", encode_shape(SHAPE)]).shape == SHAPE


def test_device_fields_that_are_newer_than_this_program_do_no_harm():
    device = Device.__struct_fields__
    assert device  # the inventory travels inside NodeInfo
    info = msgspec.json.decode(msgspec.json.encode(INFO))
    row = node_row()
    row[3] = msgspec.json.encode({**info, "later": 1})
    assert look(nodes=[row]).nodes[0].info == INFO


@pytest.mark.parametrize(("said", "expected"), [(b"", None), (b"ok", True), (b"down", False)])
def test_what_the_leader_says_of_dask(said: bytes, expected: bool | None):
    assert look(dask=(said, b"7" if said else b"")).dask is expected


def test_refused_registrations_by_name():
    found = look(refused=[b"n2", b"9 why: this", b"n1", b"8 that"]).refused
    assert [(row.node, row.at_ms, row.problem) for row in found] == [("n1", 8, "that"), ("n2", 9, "why: this")]
