"""What has happened in the store, kept beside it: each call and its answer in their order, judged at once.

It knows the promises, and not how the library keeps them. A broken one is a `Violation` that bears its name. What a look at
the records can tell is left to the recount (`tests.contract.store_harness.check_invariants`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from manager.core.ids import id_in_array
from manager.core.lifecycle import CRASHES_MAX, FINAL, LOSSES_MAX
from tests.contract.store_harness import Dump, Violation

_FINAL = frozenset(str(status) for status in FINAL)
_KEY_MS = 86_400_000
_AFTER_PREFIX = 4  # FCALL name 1 prefix

LEADER_CALLS = frozenset(
    {"ry_request", "ry_fence", "ry_drop", "ry_flag", "ry_lost", "ry_planned", "ry_mix", "ry_shares", "ry_reached", "ry_age"}
    | {"ry_sweep", "ry_refuse"}
)


def _refused(name: str, reply: Any) -> bool:
    """Whether the answer is the one for who does not lead."""
    if name == "ry_sweep":
        return not any(reply)
    return reply in (b"STALE", [b"STALE"], -1)


def require(ok: bool, name: str, detail: object) -> None:
    """Raise a `Violation` of that name unless it is so."""
    if not ok:
        raise Violation(name, str(detail))


@dataclass
class Node:
    incarnation: str = ""
    cordoned: bool = False
    cordon_by: str = ""


@dataclass
class Slot:
    node: str = ""
    incarnation: str = ""
    shape: str = ""
    flag: str = ""
    closed: bool = False


@dataclass
class Task:
    """One task as its calls tell of it."""

    tenant: str
    max_attempts: int
    has_limit: bool  # of time, so that it may end at any moment
    after: tuple[str, ...] = ()
    attempt: int = 0
    slot: str = ""  # that has claimed it now
    causes: list[str] = field(default_factory=list)  # why each attempt ended without an end of the task
    failures: int = 0
    crashes: int = 0
    losses: int = 0
    more_room: bool = False
    cancelled: bool = False  # somebody asked for it while it ran
    final: str = ""
    commits: int = 0
    checkpoint: str = ""


class Model:
    """Judges calls."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.token = 0
        self.scaler_token = 0
        self.nodes: dict[str, Node] = {}
        self.gone: dict[str, str] = {}  # incarnation → why
        self.slots: dict[str, Slot] = {}
        self.tasks: dict[str, Task] = {}
        self.arrays: dict[str, int] = {}
        self.running_max: dict[str, int] = {}
        self.keys: dict[tuple[str, str], tuple[str, tuple[str, ...], int]] = {}
        self.executions: dict[str, list[int]] = {}
        self.refused_old_leaders = 0
        self.refused_zombies = 0
        self.late_ends = 0
        self.calls_seen: list[tuple[int, tuple[Any, ...], Any]] = []

    # --- calls ----------------------------------------------------------------------------------------------------

    def saw(self, call: tuple[Any, ...], reply: Any, now_ms: int) -> None:
        """One call of a function has happened."""
        self.now_ms = now_ms
        name, args = call[1], [_text(arg) for arg in call[_AFTER_PREFIX:]]
        self.calls_seen.append((now_ms, call, reply))
        if isinstance(reply, Exception):
            raise reply
        if name in LEADER_CALLS:
            old = int(args[0]) != self.token or not self.token  # at first nobody leads
            refused = _refused(name, reply)
            require(refused or not old, "old-leader-refused", f"{name} of token {args[0]}, now {self.token}: {reply}")
            if old:
                self.refused_old_leaders += 1
                return
        if (judge := getattr(self, f"_{name}", None)) is not None:
            judge(args, reply)

    def _ry_lead(self, args: list[str], reply: Any) -> None:
        holder, _, _, step, role = args
        if step == "take" and reply[0] == b"OK":
            token = int(reply[1])
            known = self.scaler_token if role else self.token
            if token != known:
                require(token == known + 1, "terms-count-up", f"{holder} took {token} after {known}")
                if role:
                    self.scaler_token = token
                else:
                    self.token = token

    def _ry_submit(self, args: list[str], reply: Any) -> None:
        tenant, key, digest = args[0], args[2], args[3]
        first = 5 + 2 * int(args[4])
        rows = [args[i : i + 7] for i in range(first + 0, len(args), 7)]
        word = reply[0].decode()
        known = self.keys.get((tenant, key)) if key else None
        again = any(row[0] in self.tasks or row[0] in self.arrays for row in rows)
        if known is not None and not again and self.now_ms - known[2] <= _KEY_MS:
            if known[0] != digest:
                require(word == "CONFLICT", "one-key-one-request", f"{key} with another body: {reply}")
            else:
                ids = tuple(said.decode() for said in reply[1::2])
                require(word == "REPLAY" and ids == known[1], "same-key-same-task", f"{key}: {reply}, was {known}")
        if word != "OK" or again:
            return
        for task_id, _, _, max_attempts, _, _, more in rows:
            said = msgspec.json.decode(more) if more else {}
            limited = any(name in said for name in ("start_ms", "total_ms", "deadline_ms"))
            after = () if said.get("run") else tuple(said.get("after", ()))
            task = Task(tenant, int(max_attempts), limited, after)
            if count := said.get("count"):
                self.arrays[task_id] = count
                for index in range(count):
                    self.tasks[id_in_array(task_id, index)] = Task(tenant, int(max_attempts), limited, after)
            else:
                self.tasks[task_id] = task
        if key:
            self.keys[tenant, key] = (digest, tuple(row[0] for row in rows), self.now_ms)

    def _ry_cancel(self, args: list[str], reply: Any) -> None:
        if reply is None or args[0] not in self.tasks:
            return
        task = self.tasks[args[0]]
        if reply == b"RUNNING":
            task.cancelled = True
        elif not task.final:
            self._ends(args[0], reply.decode(), "cancel")

    def _ry_cancel_array(self, args: list[str], reply: Any) -> None:
        for index in range(self.arrays.get(args[0], 0)):
            self.tasks[id_in_array(args[0], index)].cancelled = True

    def _ry_shares(self, args: list[str], reply: Any) -> None:
        for i in range(int(args[1])):
            row = args[2 + 7 * i :]
            self.running_max[row[0]] = int(row[1])

    def _ry_sweep(self, args: list[str], reply: Any) -> None:
        old = self.now_ms - _KEY_MS
        self.keys = {key: said for key, said in self.keys.items() if said[2] >= old}

    # --- slots and nodes ------------------------------------------------------------------------------------------

    def _ry_register(self, args: list[str], reply: Any) -> None:
        name, incarnation = args[0], args[1]
        if reply[0] != b"OK":
            return
        require(incarnation not in self.gone, "zombie-refused", f"{incarnation} registered, {self.gone.get(incarnation)}")
        node = self.nodes.setdefault(name, Node())
        if node.incarnation != incarnation:
            self._end_incarnation(name, node.incarnation, "replaced")
            node.incarnation = incarnation

    def _ry_lost(self, args: list[str], reply: Any) -> None:
        if reply[0] == b"OK":
            self._end_incarnation(args[1], args[2], "lost")

    def _ry_leave(self, args: list[str], reply: Any) -> None:
        if reply == b"OK":
            self._alive(args[1], "left")
            self._end_incarnation(args[0], args[1], "left")
            self.gone.pop(args[1])  # it may register again
            self.nodes[args[0]].incarnation = ""

    def _end_incarnation(self, node: str, incarnation: str, why: str) -> None:
        if incarnation:
            self.gone[incarnation] = why
            for slot_id, slot in self.slots.items():
                if slot.incarnation == incarnation and not slot.closed:
                    self._close(slot_id, f"node {why}")

    def _ry_beat(self, args: list[str], reply: Any) -> None:
        if reply[0] == b"OK":
            self._alive(args[1], "beat")
        else:
            self.refused_zombies += 1

    def _alive(self, incarnation: str, what: str) -> None:
        require(incarnation not in self.gone, "zombie-refused", f"{incarnation} {what}: {self.gone.get(incarnation)}")

    def _ry_cordon(self, args: list[str], reply: Any) -> None:
        name, mode, by = args[0], args[1], args[2]
        if reply != b"OK":
            return
        node = self.nodes.setdefault(name, Node())
        if by == "autoscaler":
            require(args[5] == str(self.scaler_token), "old-leader-refused", f"an autoscaler's term {args[5]} cordoned {name}")
        require(by == "operator" or node.cordon_by != "operator", "operators-cordon-kept", f"{by} changed {name}")
        node.cordon_by = by if mode and args[4] != "1" else ""

    def _ry_open(self, args: list[str], reply: Any) -> None:
        slot_id, node, incarnation = args[:3]
        if reply[0] not in (b"OK", b"ADOPTED"):
            return
        self._alive(incarnation, f"opened {slot_id}")
        slot = self.slots.get(slot_id)
        if reply[0] == b"OK":
            require(slot is None, "slot-opens-once", f"{slot_id} by {incarnation}, was {slot}")
            self.slots[slot_id] = Slot(node, incarnation, reply[1].decode())
        else:
            own = slot is not None and slot.incarnation == incarnation and not slot.closed
            require(own, "adopts-its-own", f"{slot_id}: {slot}")

    def _ry_open_direct(self, args: list[str], reply: Any) -> None:
        if reply == b"OK":
            self._alive(args[2], f"opened {args[0]}")
            require(args[0] not in self.slots, "slot-opens-once", args[0])
            self.slots[args[0]] = Slot(args[1], args[2])

    def _ry_close(self, args: list[str], reply: Any) -> None:
        if reply == b"OK":
            self._close(args[0], f"closed by its agent: {args[2]}")

    def _ry_fence(self, args: list[str], reply: Any) -> None:
        for slot_id in args[2:]:
            self._close(slot_id, f"fenced: {args[1]}")

    def _ry_drop(self, args: list[str], reply: Any) -> None:
        for slot_id in reply[1]:
            require(slot_id.decode() not in self.slots, "open-slot-kept", f"{slot_id!r} was dropped")

    def _ry_flag(self, args: list[str], reply: Any) -> None:
        for slot_id in args[2:]:
            if (slot := self.slots.get(slot_id)) is not None and not slot.closed:
                slot.flag = args[1]

    def _close(self, slot_id: str, why: str) -> None:
        slot = self.slots.get(slot_id)
        if slot is None or slot.closed:
            return
        slot.closed = True
        for task in self.tasks.values():
            if task.slot == slot_id:
                task.slot = ""
                task.causes.append(why)
                if slot.flag != "preempt" and not task.cancelled:
                    task.losses += 1

    # --- claims and ends ------------------------------------------------------------------------------------------

    def _ry_next(self, args: list[str], reply: Any) -> None:
        slot_id, incarnation = args[0], args[1]
        word, commits, flat = reply[0].decode(), reply[1], reply[2]
        if word == "FENCED":
            self.refused_zombies += 1
            return
        self._alive(incarnation, f"got {word} for {slot_id}")
        slot = self.slots.get(slot_id)
        own = slot is not None and slot.incarnation == incarnation and not slot.closed
        require(own, "stranger-refused", f"{incarnation} got {word} for {slot_id}: {slot}")
        assert slot is not None
        for i, status in enumerate(commits):
            task_id, attempt, outcome = args[3 + 8 * i : 6 + 8 * i]
            if not status:
                self.late_ends += 1
                continue
            self._commit(slot_id, slot, task_id, int(attempt), outcome, status.decode())
        for i in range(0, len(flat), 5):
            self._claim(slot_id, flat[i].decode(), int(flat[i + 1]), flat[i + 4])

    def _commit(self, slot_id: str, slot: Slot, task_id: str, attempt: int, outcome: str, status: str) -> None:
        task = self.tasks[task_id]
        said = f"{task_id}/{attempt} by {slot_id} as {outcome}: {status}; {task}"
        require(task.commits == 0, "one-commit", said)
        require(task.attempt == attempt and task.slot == slot_id, "commit-by-current-attempt", said)
        task.slot = ""
        if status in _FINAL:
            task.commits += 1
            right = {"S": ("SUCCEEDED",), "R": ("CANCELLED", "FAILED")}.get(outcome, ("FAILED", "CANCELLED"))
            require(status in right, "end-as-told", said)
            early = status == "FAILED" and not task.has_limit and not task.cancelled
            if early and outcome == "F":
                require(task.failures + 1 >= task.max_attempts, "no-attempt-withheld", said)
            if early and outcome == "X":
                require(task.crashes + 1 >= CRASHES_MAX, "no-attempt-withheld", said)
            if early and outcome in "RA":
                raise Violation("nobody-blamed", said)
            self._ends(task_id, status, outcome)
            return
        require(outcome not in "SN", "end-as-told", said)
        task.causes.append(outcome)
        if outcome == "O":
            require(not task.more_room, "more-room-once", said)
            task.more_room = True
        elif outcome == "F":
            task.failures += 1
            require(task.failures < task.max_attempts, "retries-have-a-cap", said)
        elif outcome == "X":
            task.crashes += 1
            require(task.crashes < CRASHES_MAX, "retries-have-a-cap", said)
        elif outcome in "LC" and slot.flag != "preempt":
            task.losses += 1
            require(task.losses < LOSSES_MAX, "retries-have-a-cap", said)

    def _claim(self, slot_id: str, task_id: str, attempt: int, more: bytes) -> None:
        task = self.tasks[task_id]
        said = f"{task_id}/{attempt} by {slot_id}; {task}"
        if task.slot == slot_id and task.attempt == attempt:
            return  # told again
        require(not task.slot, "one-claim", said)
        require(attempt > task.attempt, "claim-raises-attempt", said)
        require(attempt == task.attempt + 1 == len(task.causes) + 1, "re-execution-explained", said)
        require(not task.final, "final-is-final", said)
        for parent in task.after:
            tasks = [parent] if parent in self.tasks else [id_in_array(parent, i) for i in range(self.arrays[parent])]
            require(all(self.tasks[one].final == "SUCCEEDED" for one in tasks), "after-its-parents", f"{said}: {parent}")
        task.attempt, task.slot = attempt, slot_id
        most = self.running_max.get(task.tenant, 0)
        running = sum(other.tenant == task.tenant and other.slot != "" for other in self.tasks.values()) if most else 0
        require(running <= most, "quota-kept", f"{task.tenant} has {running} of {most}")
        told = msgspec.json.decode(more).get("checkpoint", "") if more else ""
        require(told == task.checkpoint, "checkpoint-handed-on", f"{said}: {told!r}, not {task.checkpoint!r}")

    def _ry_progress(self, args: list[str], reply: Any) -> None:
        slot_id, incarnation = args[0], args[1]
        fine = 0
        for i in range(2, len(args), 5):
            task_id, attempt, _, _, checkpoint = args[i : i + 5]
            task = self.tasks[task_id]
            if task.slot == slot_id and task.attempt == int(attempt) and incarnation not in self.gone:
                fine += 1
                task.checkpoint = checkpoint or task.checkpoint
        require(reply == fine, "progress-of-current-attempt", f"{args}: {reply}, not {fine}")

    def _ends(self, task_id: str, status: str, how: str) -> None:
        task = self.tasks[task_id]
        require(not task.final or task.final == status, "final-is-final", f"{task_id}: {task.final}, then {status} by {how}")
        task.final = status

    # --- what executors do ----------------------------------------------------------------------------------------

    def executes(self, task_id: str, attempt: int) -> None:
        """An executor begins."""
        begun = self.executions.setdefault(task_id, [])
        require(attempt not in begun, "attempt-runs-once", f"{task_id}/{attempt} ran before: {begun}")
        begun.append(attempt)

    # --- the recount ----------------------------------------------------------------------------------------------

    def compare(self, found: Dump, accepted: Iterable[str]) -> None:
        """Hold what the store has against what was seen."""
        ended = {event["i"]: event["s"] for event in found.ends}
        for task_id, status in ended.items():
            self._ends(task_id, status, "an event")
        records = found.tasks
        for task_id, record in records.items():
            task = self.tasks.get(task_id)
            require(task is not None, "nothing-invented", task_id)
            assert task is not None
            attempt = int(record["attempt"])
            require(attempt == task.attempt, "attempt-as-claimed", f"{task_id}: {attempt}, not {task.attempt}")
            state = record["state"]
            require(not task.final or state == task.final, "final-is-final", f"{task_id}: {task.final} became {state}")
            require(state not in _FINAL or task_id in ended, "end-told", f"{task_id}: {state}")
            if state in _FINAL:
                result = record.get("result", "")
                good = result == f'"{task_id}/{attempt}"' if state == "SUCCEEDED" else result == ""
                require(good, "result-of-its-attempt", f"{task_id}/{attempt}: {state} {result}")
                continue
            counted = tuple(int(record.get(name, "0")) for name in ("failures", "crashes", "losses"))
            wanted = (task.failures, task.crashes, task.losses)
            require(counted == wanted or task.cancelled, "blame-as-due", f"{task_id}: {counted}, not {wanted}; {task}")
            require(record.get("slot", "") == task.slot, "claim-as-made", f"{task_id}: {record.get('slot')}, not {task.slot}")
        arrays = found.group("a:")
        for array_id, count in self.arrays.items():
            made = int(arrays.get(array_id, {}).get("made", count))
            for index in range(made, count):
                require(id_in_array(array_id, index) not in records, "array-in-order", f"{array_id}: {index} of {made}")
        waiting = {id_in_array(a, i) for a, row in arrays.items() for i in range(int(row["made"]), int(row["count"]))}
        for task_id in accepted:
            there = task_id in records or task_id in ended or task_id in arrays or task_id in waiting
            if not there and task_id in self.arrays:
                there = all(id_in_array(task_id, i) in ended for i in range(self.arrays[task_id]))
            require(there, "nothing-lost", task_id)


def line_of(now_ms: int, call: tuple[Any, ...], reply: Any) -> str:
    """One call, for people."""
    args = " ".join(_text(arg)[:60] for arg in call[_AFTER_PREFIX:])
    return f"{now_ms} {call[1]} {args[:300]} -> {_shown(reply)[:300]}"


def _text(arg: Any) -> str:
    return arg.decode(errors="replace") if isinstance(arg, bytes) else str(arg)


def _shown(reply: Any) -> str:
    if isinstance(reply, list):
        return "[" + " ".join(_shown(part) for part in reply) + "]"
    return _text(reply)[:80]
