"""Load on the REST API: people who submit tasks and wait for them, with some who list tasks and look at the cluster.

`make load` runs it on a cluster of its own. For a cluster that runs, with its key in the environment:

    ROCYARD_API_KEY=… locust -f tests/load/locustfile.py --host http://127.0.0.1:8000 --headless -u 20 -t 20s

The tasks are those of the function ``echo``, so what is measured is the way there and back.
"""

import os
from typing import Any

from locust import FastHttpUser, constant, events, task

KEY = os.environ.get("ROCYARD_API_KEY", "")
WAIT_S = 30


@events.init.add_listener
def refuse_without_key(environment: Any, **_: Any) -> None:
    """Without a key every request would fail, and that is no load."""
    if not KEY:
        raise SystemExit("set ROCYARD_API_KEY to a key of the cluster (rocyard keys create --tenant load)")


@events.quitting.add_listener
def refuse_silence(environment: Any, **_: Any) -> None:
    """A run in which nothing was finished is a failure, however few errors there were."""
    finished = environment.stats.get("/v1/tasks/ID?wait", "GET")
    if not environment.stats.total.num_failures and not finished.num_requests:
        print("no task was finished")
        environment.process_exit_code = 1


class Person(FastHttpUser):
    """Submits a task, waits for it, and now and then looks around."""

    wait_time = constant(0)
    default_headers = {"Authorization": f"Bearer {KEY}"}  # noqa: RUF012  locust's attribute
    network_timeout = WAIT_S + 10
    number = 0

    @task(10)
    def submit_and_wait(self) -> None:
        """One task, from the submission to its result, which must be what was sent."""
        self.number += 1
        body = {"function": "echo", "args": {"n": self.number}, "resources": {"memory": "1GiB"}}
        with self.client.post("/v1/tasks", json=body, name="/v1/tasks", catch_response=True) as reply:
            if reply.status_code != 202:
                reply.failure(f"status {reply.status_code}: {reply.text or reply.error}")
                return
            task_id = reply.json()["task_id"]
        path, name = f"/v1/tasks/{task_id}?wait={WAIT_S}", "/v1/tasks/ID?wait"
        with self.client.get(path, name=name, catch_response=True) as reply:
            if reply.status_code != 200:
                reply.failure(f"status {reply.status_code}: {reply.text or reply.error}")
            elif reply.json()["status"] != "SUCCEEDED" or reply.json()["result"] != {"n": self.number}:
                reply.failure(f"not what was sent: {reply.text[:300]}")

    @task(2)
    def list_tasks(self) -> None:
        """One page of tasks."""
        self.client.get("/v1/tasks?limit=50", name="/v1/tasks")

    @task(1)
    def status(self) -> None:
        """The cluster at one moment."""
        self.client.get("/v1/cluster/status", name="/v1/cluster/status")
