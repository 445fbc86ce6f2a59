"""What the REST API takes and gives: strict in what it takes, the same for server and client."""

import contextlib
import datetime as dt
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.api.body import DEPTH_MAX, batch_request, checked_json, task_request
from manager.api.cursors import decode_cursor, encode_cursor
from manager.api.query import parse_query, wait_s
from manager.api.submissions import digest_of, parents_of, refuse_infeasible, refuse_late, submission_of
from manager.core.answers import resources_in, utc
from manager.core.answers_tasks import TaskView, summary_of, view_of
from manager.core.errors import BadRequest, DeadlinePassed, Infeasible, TooLarge, UnknownDependency
from manager.core.functions import PublishedFunction
from manager.core.lifecycle import TaskStatus
from manager.core.model import TaskRecord, TaskSpec
from manager.core.node_kinds import Capacity, NodeDevice, NodeKind
from manager.core.quantities import GIB
from manager.core.requests import PRIORITIES, KeyScope, ResourceRequest, TaskRequest, priority_of
from manager.core.shapes import Resources, Shape, encode_shape
from manager.keys import make_key, parse_key, verify
from manager.settings import Settings

FUNCTION = PublishedFunction("echo", "", msgspec.Raw(b"{}"), 2 * GIB, gpus=1, time_limit_s=60.0)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)


@given(args=st.dictionaries(st.text(), json_values, max_size=5))
def test_any_arguments_that_are_json_come_through_unchanged(args):
    body = json.dumps({"function": "f", "args": args}).encode()
    request, plain = task_request(body)
    assert plain == args
    assert json.loads(bytes(request.args)) == args


@given(text=st.text(alphabet='[]{}"\\:,a1 ', max_size=200))
def test_nothing_but_a_refusal_comes_of_text_that_is_no_json(text):
    """Whatever brackets and quotes do, the answer is that of a JSON decoder or a refusal."""
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    with contextlib.suppress(BadRequest):
        assert checked_json(text.encode()) == expected


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth_is_counted_exactly(opening):
    closing = {"[": "]", '{"a":': "}"}[opening]

    def nested(depth: int) -> bytes:
        return (opening * depth + "1" + closing * depth).encode()

    def body(inner: bytes) -> bytes:
        return b'{"a":' + inner + b',"filler":[[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[]]}'

    checked_json(body(nested(DEPTH_MAX - 1)))
    with pytest.raises(BadRequest, match="deeper"):
        checked_json(body(nested(DEPTH_MAX)))


def test_brackets_in_text_are_no_depth():
    text = "[" * 100 + '\\"{{{'
    assert checked_json(json.dumps({"a": text, "b": [[]] * 40}).encode())["a"] == text


def test_defaults_are_the_functions_and_what_is_asked_for_wins():
    plain = submission_of(TaskRequest("echo"), FUNCTION, "t", "1", Settings())
    assert (plain.spec.resources, plain.spec.time_limit_s) == (Resources(2 * GIB, 1), 60.0)
    asked = TaskRequest("echo", resources=ResourceRequest("300 MiB", 2), time_limit="2m", priority=-3, max_attempts=2)
    found = submission_of(asked, FUNCTION, "t", "1", Settings())
    assert found.spec.resources == Resources(300 * 1024**2, 2)
    assert (found.spec.time_limit_s, found.spec.priority, found.spec.max_attempts) == (120.0, -3, 2)
    assert found.shape.memory_bytes == 512 * 1024**2


def test_equal_needs_of_two_tenants_are_two_shapes():
    one, other = (submission_of(TaskRequest("echo"), FUNCTION, tenant, "1", Settings()) for tenant in ("a", "b"))
    assert one.shape_id != other.shape_id


def test_arguments_over_the_limit_are_refused():
    with pytest.raises(TooLarge):
        submission_of(TaskRequest("echo", msgspec.Raw(b"x" * (256 * 1024 + 1))), FUNCTION, "t", "1", Settings())


@pytest.mark.parametrize(
    ("memory", "gpus", "ok"),
    [(10, 1, True), (11, 1, False), (4, 2, True), (5, 2, False), (1, 3, False)],
)
def test_feasibility_is_that_of_the_best_node_for_so_many_devices(memory, gpus, ok):
    devices = [NodeDevice(size * GIB, pool, "gfx942", "M") for pool, size in enumerate((10, 4))]
    capacity = Capacity({NodeKind(tuple(devices)): "a"})
    submission = submission_of(
        TaskRequest("echo", resources=ResourceRequest(memory * GIB, gpus)), FUNCTION, "t", "1", Settings()
    )
    asked = submission.spec.resources
    refuse_infeasible(submission.shape, asked, Capacity({}))
    if ok:
        refuse_infeasible(submission.shape, asked, capacity)
    else:
        with pytest.raises(Infeasible):
            refuse_infeasible(submission.shape, asked, capacity)


def test_a_refusal_says_in_which_task_which_field_and_what_the_nearest_is():
    capacity = Capacity({NodeKind((NodeDevice(10 * GIB, 0, "gfx942", "M"),)): "a"})
    asked = TaskRequest("echo", resources=ResourceRequest("10.1GiB"))
    submission = submission_of(asked, FUNCTION, "t", "1", Settings(), "tasks[3].")
    with pytest.raises(Infeasible) as refused:
        refuse_infeasible(submission.shape, submission.spec.resources, capacity, "tasks[3].")
    assert str(refused.value) == (
        "tasks[3].resources.memory: 10.1 GiB (a lease of 10.5 GiB) is more than any device here could ever hold. "
        "The largest device, M on a, can hold 10 GiB."
    )
    assert refused.value.details == {
        "reason": "ExceedsLargestDevice",
        "field": "tasks[3].resources.memory",
        "node": "a",
        "memory_bytes": int(10.5 * GIB),
        "usable_bytes_max": 10 * GIB,
    }


SELECTORS = st.fixed_dictionaries(
    {"memory_bytes": st.integers(1, 2**45), "gpus": st.integers(1, 64)},
    optional={
        "share_milli": st.integers(1, 1000),
        "architectures": st.sets(st.sampled_from(["gfx942", "cdna3", "sm_9*"]), min_size=1).map(lambda s: tuple(sorted(s))),
        "device_model": st.sampled_from(["mi300x", "mi300x|rx 7900 xtx"]),
        "labels": st.dictionaries(st.sampled_from("abc"), st.sampled_from(["x", "y/z"]), min_size=1).map(
            lambda d: tuple(sorted(d.items()))
        ),
        "cpu_milli": st.integers(1, 4096 * 1000),
        "host_memory_bytes": st.integers(1, 2**45),
        "exclusive": st.just(True),
        "model": st.just("meta/llama-3:8b"),
    },
)


@given(fields=SELECTORS)
def test_what_is_asked_for_comes_back_from_json_to_shape_to_store_to_view(fields):
    wanted = Resources(**fields)
    body = {
        "memory": wanted.memory_bytes,
        "gpus": wanted.gpus,
        "share": wanted.share_milli / 1000,
        "architecture": list(wanted.architectures),
        "device_model": wanted.device_model.upper(),
        "labels": dict(wanted.labels),
        "cpus": wanted.cpu_milli / 1000,
        "host_memory": wanted.host_memory_bytes,
        "exclusive": wanted.exclusive,
        "model": wanted.model,
    }
    request, _ = task_request(json.dumps({"function": "f", "resources": body}).encode())
    submission = submission_of(request, FUNCTION, "t", "0" * 26, Settings())
    assert submission.spec.resources == wanted
    stored = msgspec.json.decode(encode_shape(submission.shape), type=Shape)
    assert stored == submission.shape
    assert msgspec.structs.replace(stored.resources, memory_bytes=wanted.memory_bytes) == wanted
    spec = msgspec.json.decode(msgspec.json.encode(submission.spec), type=TaskSpec)
    record = TaskRecord(
        task_id="0" * 26, status=TaskStatus.QUEUED, tenant="t", function="f", shape_id="s", attempt=0, spec=spec
    )
    shown = msgspec.json.encode(view_of(record))
    assert resources_in(msgspec.json.decode(shown, type=TaskView).resources) == wanted
    named = json.loads(shown)["resources"].keys() - {"memory_bytes"}
    assert len(named) == len(fields.keys() - {"memory_bytes", "gpus"}) + (wanted.gpus > 1)


def test_what_was_stored_before_there_were_these_fields_is_still_read():
    shape = msgspec.json.decode(b'{"tenant":"t","environment":"default","memory_bytes":1073741824}', type=Shape)
    assert shape == Shape("t", "default", GIB)
    spec = b'{"function":"f","args":{},"resources":{"memory_bytes":5,"gpus":2}}'
    assert msgspec.json.decode(spec, type=TaskSpec).resources == Resources(5, 2)


@pytest.mark.parametrize(("given", "number"), [*PRIORITIES.items(), (" High ", 5), (-10, -10), (3, 3)])
def test_a_priority_is_a_number_or_a_name(given, number):
    assert priority_of(given) == number
    submission = submission_of(TaskRequest("echo", priority=given), FUNCTION, "t", "1", Settings())
    assert submission.spec.priority == number


def test_an_unknown_priority_names_the_nearest_and_where_it_stands():
    with pytest.raises(BadRequest, match=r"tasks\[1\]\.priority: 'hihg' is not a priority, did you mean 'high'\?"):
        submission_of(TaskRequest("echo", priority="hihg"), FUNCTION, "t", "1", Settings(), "tasks[1].")


def test_a_batch_keeps_its_order():
    body = json.dumps({"tasks": [{"function": f"f{number}", "args": {"n": number}} for number in range(20)]}).encode()
    assert [(r.function, plain["n"]) for r, plain in batch_request(body)] == [(f"f{n}", n) for n in range(20)]


def test_a_view_reads_back_as_it_was_written():
    spec = TaskSpec("echo", msgspec.Raw(b'{"x":1}'), Resources(GIB))
    record = TaskRecord(
        task_id="0" * 26, status=TaskStatus.SUCCEEDED, tenant="t", function="echo", shape_id="s", attempt=1,
        created_ms=1_700_000_000_123, finished_ms=1_700_000_001_000, spec=spec, result=b'{"y":[1,2]}', node="n",
    )  # fmt: skip
    raw = msgspec.json.encode(view_of(record, with_args=True))
    plain = json.loads(raw)
    assert plain["created_at"] == "2023-11-14T22:13:20.123000Z"
    assert (plain["result"], plain["args"], plain["started_at"]) == ({"y": [1, 2]}, {"x": 1}, None)
    back = msgspec.json.decode(raw, type=TaskView)
    assert (bytes(back.result), back.status, back.created_at) == (b'{"y":[1,2]}', TaskStatus.SUCCEEDED, utc(1_700_000_000_123))
    assert "args" not in json.loads(msgspec.json.encode(view_of(record)))
    assert "result" not in json.loads(msgspec.json.encode(summary_of(record)))
    assert back.created_at.tzinfo is dt.UTC


def test_a_view_of_tomorrow_is_read_today():
    spec = TaskSpec("echo", msgspec.Raw(b"{}"), Resources(GIB))
    record = TaskRecord(task_id="0", status=TaskStatus.QUEUED, tenant="t", function="f", shape_id="s", attempt=0, spec=spec)
    plain = json.loads(msgspec.json.encode(view_of(record))) | {"a_new_field": 1}
    assert msgspec.json.decode(json.dumps(plain), type=TaskView).function == "f"


def test_keys_have_their_form_and_verify_only_their_secret():
    text, record = make_key("team-1", KeyScope.USER, 0)
    parsed = parse_key(text)
    assert parsed is not None
    assert (parsed[0], len(parsed[1])) == (record.key_id, 43)
    assert verify(record, parsed[1])
    assert not verify(record, parsed[1][:-1] + ("A" if parsed[1][-1] != "A" else "B"))
    assert not verify(None, parsed[1])
    assert not verify(msgspec.structs.replace(record, revoked_ms=1), parsed[1])
    assert parsed[1] not in repr(record)
    assert parse_key(text + "x") is None
    assert parse_key(text + "\n") is None


@pytest.mark.parametrize("tenant", ["", "A", "a b", "a:b", "-a", "a" * 64, "a\n", "é", "../x"])
def test_what_cannot_name_a_tenant_is_refused(tenant):
    with pytest.raises(BadRequest):
        make_key(tenant, KeyScope.USER, 0)


@given(before=st.integers(0, 2**53), filters=st.tuples(st.text(), st.text()))
def test_a_cursor_gives_its_number_back_to_its_key_and_filters_only(before, filters):
    (_, key), (_, other) = (make_key("t", KeyScope.READ, 0) for _ in range(2))
    text = encode_cursor(key, filters, before)
    assert decode_cursor(key, filters, text) == before
    for wrong_key, wrong_filters in ((other, filters), (key, (filters[0] + "x", filters[1]))):
        with pytest.raises(BadRequest):
            decode_cursor(wrong_key, wrong_filters, text)


@given(raw=st.binary(max_size=60))
def test_any_query_is_read_or_refused(raw):
    try:
        found = parse_query(raw, ("a", "b"))
    except BadRequest:
        return
    assert found.keys() <= {"a", "b"}


def test_a_wait_is_cut_to_the_limit():
    assert (wait_s("2", 60.0), wait_s("5m", 60.0), wait_s("0", 60.0)) == (2.0, 60.0, 0.0)


@given(args=st.dictionaries(st.text(), json_values, max_size=5))
def test_a_request_has_one_digest_however_it_is_written(args):
    asked = {"function": "f", "args": args, "priority": 1}
    other = json.dumps(dict(reversed(asked.items())), indent=3, ensure_ascii=False)
    assert digest_of(json.loads(other)) == digest_of(asked)
    assert digest_of(asked | {"priority": 2}) != digest_of(asked)
    assert digest_of({"function": "f", "args": asked}) != digest_of(asked)


def test_a_digest_can_be_made_of_all_that_is_taken():
    for value in (2**200, -(2**64), 1e300, "\u0000\ud83d\ude00", [], {}):
        body = json.dumps({"function": "f", "args": {"x": value}}).encode()
        assert checked_json(body)
        assert len(digest_of(json.loads(body))) == 64


def test_what_a_task_comes_after_is_named_by_ids_and_in_a_batch_by_numbers():
    ids = tuple(f"{number:026}" for number in range(4))
    assert parents_of(TaskRequest("f", after=(ids[3], 1, ids[1], 0, 1)), ids[:2]) == (ids[3], ids[1], ids[0])
    assert parents_of(TaskRequest("f", after=(ids[0], ids[0])), None) == (ids[0],)
    for after, before, error, words in (
        ((0,), None, BadRequest, r"after\[0\]: a number names a task of the same batch"),
        ((2,), ids[:2], BadRequest, r"0 to 1"),
        ((-1,), ids[:2], BadRequest, r"0 to 1"),
        ((0,), (), BadRequest, r"no task before this one"),
        (("x",), ids, UnknownDependency, r"after\[0\]: 'x' is no id"),
    ):
        with pytest.raises(error, match=words):
            parents_of(TaskRequest("f", after=after), before)


def test_a_deadline_is_checked_against_the_clock_of_the_store():
    moment = dt.datetime(2026, 5, 1, 12, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    spec = submission_of(TaskRequest("echo", deadline=moment), FUNCTION, "t", "1", Settings()).spec
    assert spec.deadline_ms == int(moment.timestamp() * 1000)
    refuse_late(spec, spec.deadline_ms - 1)
    with pytest.raises(DeadlinePassed, match=r"tasks\[1\]\.deadline: 2026-05-01T10:00:00Z was 65\.0 s ago"):
        refuse_late(spec, spec.deadline_ms + 65_000, "tasks[1].")
    with pytest.raises(BadRequest, match="366 days"):
        refuse_late(spec, spec.deadline_ms - 367 * 86_400_000)
    long_ago = TaskRequest("echo", deadline=dt.datetime(1900, 1, 1, tzinfo=dt.UTC))
    with pytest.raises(DeadlinePassed):
        refuse_late(submission_of(long_ago, FUNCTION, "t", "1", Settings()).spec, 1_000_000)
