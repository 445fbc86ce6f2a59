"""The peer of the HTTP benchmark: a FastAPI + Celery + Redis service with the same two routes and the same bodies.

POST hands the task to Celery with `delay`, in the event loop, which was faster than FastAPI's thread pool. GET waits in
one of two ways, chosen by PEER_WAIT, since people build it in both:

- ``result``: ``AsyncResult.get(timeout=…)`` in FastAPI's thread pool, the usual way;
- ``listener``: one Redis subscription per process to all results, and an asyncio future per waiting request. More code,
  less waiting; nobody gets it from Celery's documentation, but a careful team would write it.

Celery's settings are its defaults. There is no authentication here, which favours this side. Redis' URL comes in
PEER_REDIS_URL, since Celery and uvicorn import this module in processes of their own.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import redis.asyncio
from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult
from fastapi import FastAPI
from pydantic import BaseModel

URL = os.environ["PEER_REDIS_URL"]
PREFIX = "celery-task-meta-"

worker = Celery("peer", broker=URL, backend=URL)
waiting: dict[str, list[asyncio.Future[bytes]]] = {}


@worker.task(name="echo")  # type: ignore[untyped-decorator]  # Celery has no types
def echo(x: int) -> dict[str, int]:
    return {"x": x}


class Submission(BaseModel):
    """Body of POST."""

    function: str
    args: dict[str, int]


class Task(BaseModel):
    """Answer of both routes."""

    task_id: str
    status: str
    result: dict[str, int] | None = None


async def listen(connection: Any) -> None:
    """Hand every result to whoever waits for it."""
    subscription = connection.pubsub()
    await subscription.psubscribe(f"{PREFIX}*")
    async for message in subscription.listen():
        if message["type"] == "pmessage":
            for future in waiting.pop(message["channel"].decode().removeprefix(PREFIX), ()):
                if not future.done():
                    future.set_result(message["data"])


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.redis = redis.asyncio.from_url(URL)
    listening = asyncio.create_task(listen(app.state.redis))
    yield
    listening.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/v1/tasks", status_code=202)
async def submit(submission: Submission) -> Task:
    sent = echo.delay(submission.args["x"])
    return Task(task_id=sent.id, status="PENDING")


def get_by_result(task_id: str, wait: float = 0) -> Task:
    found = AsyncResult(task_id, app=worker)
    try:
        result = found.get(timeout=wait)
    except CeleryTimeoutError:
        return Task(task_id=task_id, status="PENDING")
    return Task(task_id=task_id, status="SUCCESS", result=result)


async def get_by_listener(task_id: str, wait: float = 0) -> Task:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    waiting.setdefault(task_id, []).append(future)
    data = await app.state.redis.get(PREFIX + task_id)
    if data is None:
        try:
            data = await asyncio.wait_for(future, wait)
        except TimeoutError:
            return Task(task_id=task_id, status="PENDING")
    found = msgspec.json.decode(data)
    return Task(task_id=task_id, status=found["status"], result=found["result"])


get = get_by_listener if os.environ.get("PEER_WAIT") == "listener" else get_by_result
app.get("/v1/tasks/{task_id}")(get)
