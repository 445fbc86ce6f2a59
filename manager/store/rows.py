"""From the store's flat answers to records. Pure; the orders of fields are those of the library's reads."""

from typing import Any, Final

import msgspec

from manager.core.lifecycle import Cordon, SlotFlag, SlotKind, SlotStatus, TaskStatus
from manager.core.mix import decode_mix
from manager.core.model import (
    ArrayRow,
    Attempt,
    Claim,
    ClusterState,
    DeviceUse,
    NodeInfo,
    NodeRow,
    OpenReply,
    QueueRow,
    Refusal,
    ResultFile,
    SlotRow,
    TaskError,
    TaskEvent,
    TaskRecord,
    TaskSpec,
    TenantRow,
)
from manager.core.shapes import Grant, Shape

TASK_FIELDS: Final = (
    *("state", "tenant", "function", "shape", "attempt", "failures", "crashes", "losses", "score", "node", "slot"),
    *("cancel", "created", "queued", "started", "finished", "spec", "result", "error"),
    *("file", "claimed", "waits", "progress", "message", "checkpoint", "array", "index", "oom"),
)
ARRAY_FIELDS: Final = (
    *("tenant", "function", "count", "made", "succeeded", "failed", "cancelled", "created", "spec", "sequence"),
)
_TRY: Final = b"try:"


class _ClaimMore(msgspec.Struct, frozen=True):
    """What a claim says beside the task itself."""

    index: int | None = None
    checkpoint: str = ""
    more_memory: bool = False


_NOTHING_MORE: Final = _ClaimMore()
_spec = msgspec.json.Decoder(TaskSpec).decode
_error = msgspec.json.Decoder(TaskError).decode
_shape = msgspec.json.Decoder(Shape).decode
_info = msgspec.json.Decoder(NodeInfo).decode
_uses = msgspec.json.Decoder(tuple[DeviceUse, ...]).decode
_file = msgspec.json.Decoder(ResultFile).decode
_attempt = msgspec.json.Decoder(Attempt).decode
_claim_more = msgspec.json.Decoder(_ClaimMore).decode


def _ms(value: bytes | None) -> int | None:
    return int(value) if value else None


def _text(value: bytes | None) -> str:
    return value.decode() if value else ""


def status(text: bytes) -> TaskStatus | None:
    """A status where one is said; empty: there is no such task."""
    return TaskStatus(text.decode()) if text else None


def task(task_id: str, row: list[Any]) -> TaskRecord | None:
    """The record of one task from its fields in the order of `TASK_FIELDS`; None where there is none."""
    if row[0] is None:
        return None
    (state, tenant, function, shape, attempt, failures, crashes, losses, score, node, slot) = row[:11]
    (cancel, created, queued, started, finished, spec, result, error) = row[11:19]
    (file, claimed, waits, progress, message, checkpoint, array, index, oom) = row[19:]
    return TaskRecord(
        task_id=task_id,
        status=TaskStatus(state.decode()),
        tenant=_text(tenant),
        function=_text(function),
        shape_id=_text(shape),
        attempt=int(attempt),
        failures=int(failures or 0),
        crashes=int(crashes or 0),
        losses=int(losses or 0),
        score=int(score or 0),
        node=_text(node),
        slot=_text(slot),
        cancel_requested=cancel == b"1",
        created_ms=int(created),
        queued_ms=_ms(queued),
        started_ms=_ms(started),
        finished_ms=_ms(finished),
        spec=_spec(spec) if spec else None,
        result=result,
        error=_error(error) if error else None,
        result_file=_file(file) if file else None,
        claimed_ms=_ms(claimed),
        waits=int(waits or 0),
        progress=float(progress) if progress else None,
        progress_message=_text(message).strip(),
        checkpoint=_text(checkpoint),
        array_id=_text(array),
        index=int(index) if index else None,
        more_memory=oom == b"1",
    )


def attempts(flat: list[bytes]) -> list[tuple[int, Attempt]]:
    """The earlier attempts of a task, by number, from all fields of its record."""
    found = [
        (int(flat[i].removeprefix(_TRY)), _attempt(flat[i + 1])) for i in range(0, len(flat), 2) if flat[i].startswith(_TRY)
    ]
    return sorted(found, key=lambda pair: pair[0])


def array(array_id: str, row: list[Any]) -> ArrayRow | None:
    """An array from its fields in the order of `ARRAY_FIELDS`; None where there is none."""
    if row[0] is None:
        return None
    tenant, function, count, made, succeeded, failed, cancelled, created, spec, sequence = row
    return ArrayRow(
        array_id=array_id,
        tenant=_text(tenant),
        function=_text(function),
        count=int(count),
        made=int(made),
        sequence=int(sequence),
        succeeded=int(succeeded or 0),
        failed=int(failed or 0),
        cancelled=int(cancelled or 0),
        created_ms=int(created),
        spec=_spec(spec),
    )


def claims(flat: list[Any]) -> tuple[Claim, ...]:
    """Claims, of which each has five values."""
    found = []
    for i in range(0, len(flat), 5):
        task_id, attempt, alone, spec, more = flat[i : i + 5]
        said = _claim_more(more) if more else _NOTHING_MORE
        found.append(
            Claim(task_id.decode(), attempt, alone == b"1", _spec(spec), said.index, said.checkpoint, said.more_memory)
        )
    return tuple(found)


def listed(tenant: str, row: list[Any]) -> TaskRecord:
    """A row of a list: no arguments and no result."""
    task_id, state, function, attempt, shape, node, created, queued, started, finished = row[:10]
    failures, crashes, losses, error, array, index, progress, _sequence = row[10:]
    return TaskRecord(
        task_id=task_id.decode(),
        status=TaskStatus(state.decode()),
        tenant=tenant,
        function=_text(function),
        shape_id=_text(shape),
        attempt=int(attempt),
        failures=int(failures or 0),
        crashes=int(crashes or 0),
        losses=int(losses or 0),
        node=_text(node),
        created_ms=int(created),
        queued_ms=_ms(queued),
        started_ms=_ms(started),
        finished_ms=_ms(finished),
        error=_error(error) if error else None,
        array_id=_text(array),
        index=int(index) if index else None,
        progress=float(progress) if progress else None,
    )


def event(fields: list[bytes]) -> TaskEvent:
    """An entry of the event stream."""
    found = {fields[i]: fields[i + 1] for i in range(0, len(fields), 2)}
    error = found.get(b"e")
    return TaskEvent(
        task_id=found[b"i"].decode(),
        status=TaskStatus(found[b"s"].decode()),
        attempt=int(found[b"a"]),
        node=_text(found.get(b"n")),
        started_ms=_ms(found.get(b"b")),
        finished_ms=int(found[b"f"]),
        inline=b"r" in found,
        result=found.get(b"r") or None,
        error=_error(error) if error else None,
    )


def opened(reply: list[Any]) -> OpenReply:
    """Answer to `open`."""
    word = reply[0].decode()
    if len(reply) < 3:
        return OpenReply(word)
    return OpenReply(word, reply[1].decode(), _shape(reply[2]))


def grant_fields(grant: Grant) -> tuple[str | int, ...]:
    """A grant in the order of the library's `write_grant`, from where the devices stand."""
    return (
        *(",".join(grant.devices), grant.memory_bytes, grant.share_milli, grant.cpu_milli, grant.host_memory_bytes),
        *("1" if grant.exclusive else "", grant.model),
    )


def _slot(row: list[Any]) -> SlotRow:
    slot_id, shape, status, node, incarnation, devices, flag, requested, opened_at, idle, served = row[:11]
    token, kind, memory, share, cpu, host, exclusive, model, score, running = row[11:]
    return SlotRow(
        slot_id=slot_id.decode(),
        shape_id=_text(shape),
        status=SlotStatus(status.decode()),
        node=_text(node),
        incarnation=_text(incarnation),
        devices=tuple(_text(devices).split(",")) if devices else (),
        flag=SlotFlag(_text(flag)),
        requested_ms=int(requested or 0),
        opened_ms=_ms(opened_at),
        idle_ms=_ms(idle),
        served=int(served or 0),
        token=int(token or 0),
        running=int(running),
        kind=SlotKind(_text(kind)),
        memory_bytes=int(memory or 0),
        share_milli=int(share or 0),
        cpu_milli=int(cpu or 0),
        host_memory_bytes=int(host or 0),
        exclusive=exclusive == b"1",
        model=_text(model),
        score=int(score) if score and int(running) else None,
    )


def _queue(row: list[Any]) -> QueueRow:
    row = row[:12]  # later functions may say more
    shape_id, shape, depth, head, queued, run_ms, warm, unload, learned, peak, vtime, oom = row
    return QueueRow(
        shape_id=shape_id.decode(),
        shape=_shape(shape),
        depth=int(depth),
        head=int(float(head)) if head else None,
        head_queued_ms=_ms(queued),
        run_s=float(run_ms) / 1000 if run_ms else None,
        warm=int(warm),
        unload_ms=_ms(unload),
        learned_bytes=int(learned),
        peak_bytes=int(peak or 0),
        vtime_s=float(vtime) if vtime else None,
        out_of_memory=oom == b"1",
    )


def _node(row: list[Any]) -> NodeRow:
    node, incarnation, beat, info, fenced, left, registered = row[:7]
    cordon, cordon_by, cordoned, deadline, remove, uses, seen, address = row[7:]
    try:
        readings = _uses(uses) if uses else ()
        read_ms = _ms(seen)
    except (msgspec.MsgspecError, ValueError):  # a Dask worker may write what it likes there: it spoils its own node only
        readings, read_ms = (), None
    return NodeRow(
        node=node.decode(),
        incarnation=_text(incarnation),
        beat=int(beat or 0),
        info=_info(info),
        fenced=bool(fenced) and fenced == incarnation,
        left=left == b"1",
        uses=readings,
        uses_ms=read_ms,
        address=(address or b"").decode(errors="replace"),
        registered_ms=_ms(registered),
        cordon=Cordon(_text(cordon)),
        cordon_by=_text(cordon_by),
        cordon_ms=_ms(cordoned),
        deadline_ms=_ms(deadline),
        remove=remove == b"1",
    )


def _tenant(row: list[Any]) -> TenantRow:
    tenant, gpus, memory, running, active, gpus_max, memory_max, running_max, weight, vtime = row
    return TenantRow(
        tenant=tenant.decode(),
        gpus=int(gpus or 0),
        memory_bytes=int(memory or 0),
        running=int(running or 0),
        active=int(active or 0),
        gpus_max=int(gpus_max or 0) or None,
        memory_bytes_max=int(memory_max or 0) or None,
        running_max=int(running_max or 0) or None,
        weight=float(weight or 1),
        vtime_s=float(vtime) if vtime else None,
    )


def _refusal(node: bytes, said: bytes) -> Refusal:
    at, _, problem = said.decode().partition(" ")
    return Refusal(node.decode(), int(at), problem)


def state(reply: list[Any]) -> ClusterState:
    """One look at the cluster."""
    now, queues, slots, nodes, refused, (dask, dask_since), tenants, mix = reply
    return ClusterState(
        now_ms=int(now),
        queues=tuple(sorted((_queue(row) for row in queues), key=lambda row: row.shape_id)),
        slots=tuple(sorted((_slot(row) for row in slots), key=lambda row: row.slot_id)),
        nodes=tuple(sorted((_node(row) for row in nodes if row[3]), key=lambda row: row.node)),
        refused=tuple(sorted((_refusal(*refused[i : i + 2]) for i in range(0, len(refused), 2)), key=lambda row: row.node)),
        dask=dask == b"ok" if dask else None,
        dask_ms=_ms(dask_since),
        tenants=tuple(sorted((_tenant(row) for row in tenants), key=lambda row: row.tenant)),
        mix=decode_mix(mix),
    )
