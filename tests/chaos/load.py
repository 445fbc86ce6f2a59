"""The load of a run: seeded clients that submit over REST, look, and cancel, and write down every call before and after it.

An answer that does not say whether the call was done is *unknown*, never failed. A submission bears an Idempotency-Key and is
sent again with it until somebody says what became of it.
"""

import asyncio
import itertools
import random
from collections import deque
from typing import Any, Final

import httpx
import msgspec

from manager.core.ids import id_in_array
from tests.chaos.history import Call, Due, Outcome, Writer, now

CLIENTS: Final = 8
RATE: Final = 12.0
"""Tasks in a second, of all clients together: some 20,000 in half an hour, which two cores can do beside the faults."""
ANSWER_S: Final = 6.0
AGAIN_S: Final = 0.3
ATTEMPTS_MAX: Final = 40
"""Sends of one submission: longer than any fault stays."""
RECENT: Final = 64
MEMORIES: Final = ("1GiB", "16GiB", "60GiB", "120GiB")
MIX: Final = {
    "quick": 40,
    "short": 24,
    "long": 10,
    "pair": 5,
    "large": 5,
    "fails": 4,
    "flaky": 5,
    "shaky": 3,
    "poison": 2,
    "late": 2,
}
GROUPS: Final = {"one": 90, "batch": 3, "chain": 5, "array": 2}
LARGE_BYTES: Final = 300_000
"""More than lies in a record."""


class Submission(msgspec.Struct, frozen=True):
    """One task to submit, or an array of `count`: the body without key and path, and how it must end. `after`: in a batch."""

    function: str
    args: dict[str, Any]
    due: Due
    memory: str
    gpus: int = 1
    more: dict[str, Any] = {}


def draw(chance: random.Random) -> Submission:
    """The next task."""
    kind = chance.choices(list(MIX), list(MIX.values()))[0]
    memory = chance.choice(MEMORIES)
    match kind:
        case "quick":
            return Submission("chaos-work", {"seconds": round(chance.uniform(0, 0.1), 3)}, Due.SUCCEEDED, memory)
        case "short":
            return Submission("chaos-work", {"seconds": round(chance.uniform(0.1, 1.0), 3)}, Due.SUCCEEDED, memory)
        case "long":
            return Submission("chaos-work", {"seconds": round(chance.uniform(2, 8), 3)}, Due.SUCCEEDED, memory)
        case "pair":
            return Submission("chaos-work", {"seconds": round(chance.uniform(0, 0.5), 3)}, Due.SUCCEEDED, memory, gpus=2)
        case "fails":
            return Submission("chaos-fail", {"times": 1000}, Due.FAILED, memory, more={"max_attempts": chance.choice((1, 2))})
        case "flaky":
            return Submission("chaos-fail", {"times": 1}, Due.SUCCEEDED, memory, more={"max_attempts": 2})
        case "large":
            return Submission("chaos-work", {"seconds": 0.05, "size": LARGE_BYTES}, Due.SUCCEEDED, memory)
        case "late":
            limit = {"total_timeout": chance.choice((1, 2, 3))}
            return Submission("chaos-work", {"seconds": 600}, Due.LATE, memory, more=limit)
        case "shaky":
            return Submission("chaos-crash", {"times": 1}, Due.SUCCEEDED, memory)
        case _:
            return Submission("chaos-crash", {"times": 1000}, Due.POISON, memory)


def draw_group(chance: random.Random) -> list[Submission]:
    """What the next request submits."""
    match chance.choices(list(GROUPS), list(GROUPS.values()))[0]:
        case "batch":
            return [draw(chance) for _ in range(chance.randint(2, 8))]
        case "chain":
            # The last one waits for the first two, and is to run whatever becomes of them, or not.
            parents = [draw(chance), draw(chance)]
            after = {"after": [0, 1], "after_failed": chance.choice(("fail", "run"))}
            return [*parents, Submission("chaos-work", {"seconds": 0.1}, Due.SUCCEEDED, chance.choice(MEMORIES), more=after)]
        case "array":
            count = {"count": chance.randint(2, 12), "index_as": "index"}
            return [Submission("chaos-work", {"seconds": 0.1}, Due.SUCCEEDED, chance.choice(MEMORIES), more=count)]
        case _:
            return [draw(chance)]


def keys_of(name: str, wanted: list[Submission]) -> dict[str, Due]:
    """The keys of all tasks of one request, in the order of their ids."""
    keys = {}
    for at, one in enumerate(wanted):
        count = one.more.get("count", 0)
        keys |= {f"{name}-{at}/{index}": one.due for index in range(count)} if count else {f"{name}-{at}": one.due}
    return keys


class Load:
    """All clients of one run.

    Args:
        url: of the API.
        api_key: theirs.
        witness: where tasks write.
        seed: of everything that is drawn.
        calls: what they say.
    """

    def __init__(self, url: str, api_key: str, witness: str, seed: int, calls: Writer) -> None:
        self.witness = witness
        self.seed = seed
        self.calls = calls
        self.attempted = 0
        self.acknowledged = 0
        self._numbers = itertools.count(1)
        self._recent: deque[str] = deque(maxlen=RECENT)
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=ANSWER_S,
            limits=httpx.Limits(max_connections=4 * CLIENTS, keepalive_expiry=2.0),
            trust_env=False,
        )

    async def run(self, until: float) -> None:
        """Go on until that time; returns when every client has its last answer."""
        try:
            async with asyncio.TaskGroup() as clients:
                for number in range(CLIENTS):
                    clients.create_task(self._client(number, until))
        finally:
            await self._http.aclose()

    async def _client(self, number: int, until: float) -> None:
        chance = random.Random(f"client {self.seed} {number}")
        following = now()
        while True:
            # By the clock, not by the answers: after an outage it catches up.
            following += chance.expovariate(RATE / CLIENTS)
            if following > until:
                return
            await asyncio.sleep(max(0.0, following - now()))
            await self._submit(draw_group(chance), f"{self.seed}-{number}-{next(self._numbers)}")
            if chance.random() < 0.15 and self._recent:
                await self._look(chance.choice(tuple(self._recent)), chance.choice(("0", "0.5", "2")))
            if chance.random() < 0.06 and self._recent:
                await self._cancel(chance.choice(tuple(self._recent)))

    # --- calls --------------------------------------------------------------------------------------------------

    async def _submit(self, wanted: list[Submission], name: str) -> None:
        keys = keys_of(name, wanted)
        bodies = [
            {
                "function": one.function,
                "args": {"path": self.witness, "key": f"{name}-{at}", **one.args},
                "resources": {"memory": one.memory, "gpus": one.gpus},
                **one.more,
            }
            for at, one in enumerate(wanted)
        ]
        path, body = ("/v1/tasks", bodies[0]) if len(bodies) == 1 else ("/v1/tasks/batch", {"tasks": bodies})
        self.attempted += len(keys)
        for _ in range(ATTEMPTS_MAX):
            call = self._invoke("submit", keys=keys)
            answer = await self._post(path, body, {"Idempotency-Key": name})
            outcome = _outcome(answer)
            if isinstance(answer, httpx.Response) and outcome is Outcome.OK:
                said = answer.json()
                ids = tuple(one["task_id"] for one in said.get("tasks", [said]))
                if count := said.get("count", 0):
                    ids = tuple(id_in_array(ids[0], index) for index in range(count))
                self._recent += ids
                self.acknowledged += len(ids)
                self._tell(call, outcome, ids=ids, status=answer.status_code, replayed=said.get("replayed", False))
                return
            status = answer.status_code if isinstance(answer, httpx.Response) else 0
            self._tell(call, outcome, status=status)
            if 400 <= status < 500 and status != 429:
                return
            await asyncio.sleep(AGAIN_S)

    async def _look(self, task: str, wait_s: str) -> None:
        call = self._invoke("get", task=task)
        try:
            answer: httpx.Response | httpx.TransportError = await self._http.get(f"/v1/tasks/{task}", params={"wait": wait_s})
        except httpx.TransportError as error:
            answer = error
        self._tell_state(call, answer)

    async def _cancel(self, task: str) -> None:
        call = self._invoke("cancel", task=task)
        self._tell_state(call, await self._post(f"/v1/tasks/{task}/cancel", None, {}))

    async def _post(self, path: str, body: Any, headers: dict[str, str]) -> httpx.Response | httpx.TransportError:
        try:
            return await self._http.post(path, json=body, headers=headers) if body else await self._http.post(path)
        except httpx.TransportError as error:
            return error

    # --- what is written down -------------------------------------------------------------------------------------

    def _invoke(self, op: str, **more: Any) -> Call:
        call = Call(number=next(self._numbers), outcome=Outcome.INVOKE, op=op, at=now(), **more)
        self.calls.write(call)
        return call

    def _tell(self, call: Call, outcome: Outcome, **more: Any) -> None:
        self.calls.write(msgspec.structs.replace(call, outcome=outcome, at=now(), **more))

    def _tell_state(self, call: Call, answer: httpx.Response | httpx.TransportError) -> None:
        if isinstance(answer, httpx.Response):
            state = answer.json().get("status", "") if answer.is_success else ""
            self._tell(call, _outcome(answer), status=answer.status_code, state=state)
        else:
            self._tell(call, _outcome(answer))


def _outcome(answer: httpx.Response | httpx.TransportError) -> Outcome:
    if isinstance(answer, httpx.ConnectError):
        return Outcome.FAIL  # nothing was sent
    if isinstance(answer, httpx.TransportError) or answer.status_code >= 500:
        return Outcome.UNKNOWN
    return Outcome.OK if answer.is_success else Outcome.FAIL
