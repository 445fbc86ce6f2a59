"""The peer of the HTTP benchmark: the usual FastAPI + Celery + Redis service, with the same two routes.

POST hands the task to Celery with `delay`; GET waits for its result with `AsyncResult.get`. Both are plain functions, so
FastAPI runs them in its thread pool, which is what its documentation tells people to do with blocking calls, and which
was the faster of the ways tried (docs/performance.md). Celery's settings are its defaults. There is no
authentication here: that favours this side.

The URL of Redis comes in PEER_REDIS_URL, since Celery and uvicorn import this module in processes of their own.
"""

import os

from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult
from fastapi import FastAPI
from pydantic import BaseModel

URL = os.environ.get("PEER_REDIS_URL", "redis://127.0.0.1:6379/0")
worker = Celery("peer", broker=URL, backend=URL)
app = FastAPI()


@worker.task(name="echo")  # type: ignore[untyped-decorator]  # Celery has no types
def echo(x: int) -> dict[str, int]:
    return {"x": x}


class Submission(BaseModel):
    """Body of POST."""

    function: str
    args: dict[str, int]


class Task(BaseModel):
    """Answer of both routes."""

    id: str
    status: str
    result: dict[str, int] | None = None


@app.post("/v1/tasks", status_code=202)
def submit(submission: Submission) -> Task:
    sent = echo.delay(submission.args["x"])
    return Task(id=sent.id, status="PENDING")


@app.get("/v1/tasks/{task_id}")
def get(task_id: str, wait: float = 0) -> Task:
    found = AsyncResult(task_id, app=worker)
    try:
        result = found.get(timeout=wait) if wait else None
    except CeleryTimeoutError:
        return Task(id=task_id, status="PENDING")
    return Task(id=task_id, status="SUCCESS", result=result)
