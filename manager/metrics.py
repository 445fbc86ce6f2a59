"""Every metric of the product, declared once: name, help, labels, base unit. docs/metrics.md lists them.

Owns names and what a label may hold. Processes import what they use; the module reads nothing and decides nothing.
Labels hold no ids of tasks, slots or addresses: what people may choose without end does not belong in a label. Of tenants, whom
admins choose, a bounded number has a label of its own.
The registry is prometheus-client's default one, so that Dask's own ``/metrics`` shows ours too.
"""

import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Final

import prometheus_client
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.exposition import MetricsHandler

from manager.core.errors import StartError

# A second series for each counter and histogram with its birth time: nobody reads them.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

OTHER: Final = "other"
_FAST: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LONG: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 14_400, 86_400)
_DEVICE: Final = ("hostname", "gpu_id", "gpu_uuid", "card_model")
"""The label names of AMD's exporter, so that its series and ours join."""

# Tasks. The first two keep the names that the older manager had.
TASKS = Counter("tasks_total", "Tasks that reached a final status.", ("status",))
TASK_DURATION = Histogram("task_duration_seconds", "Run time of tasks, from start to end.", buckets=_LONG)
TASK_RETRIES = Counter("rocyard_task_retries_total", "Tasks that are run again, by reason.", ("reason",))
TIMED_STEPS = Counter("rocyard_timed_steps_total", "Tasks that time or another's end has moved on, by how.", ("step",))
REFUSED_TASKS = Counter("rocyard_refused_tasks_total", "Tasks that ran out of device memory, and that nothing holds with more.")
RESULTS_REMOVED = Counter("rocyard_results_removed_total", "Results and folders of checkpoints that were removed.", ("why",))
RESULTS_REFUSED = Gauge("rocyard_results_refused", "1 while no scan removes results: they are not known to be the cluster's.")
QUEUE_TASKS = Gauge("rocyard_queue_tasks", "Tasks by status; final ones as long as they are kept.", ("status",))
QUEUE_OLDEST_WAIT = Gauge("rocyard_queue_oldest_wait_seconds", "How long the longest waiting task has been queued.")
TENANT_TASKS = Gauge(
    "rocyard_tenant_tasks",
    "Tasks of a tenant; the hundred busiest have a label each, the others one that is empty.",
    ("tenant", "state"),
)
TENANT_GPUS = Gauge("rocyard_tenant_gpus", "Devices of a tenant's slots at work, each slot's counted for itself.", ("tenant",))
TENANT_MEMORY = Gauge("rocyard_tenant_memory_bytes", "Device memory that a tenant's slots at work lease.", ("tenant",))

# Slots, executors and what the controller and the scheduler plugin do about them.
SLOTS = Gauge("rocyard_slots", "Slots by status.", ("status",))
RESERVATIONS = Gauge("rocyard_reservations", "Dask tasks that others have passed for long, with room kept for them.")
PLACEMENTS = Counter("rocyard_placements_total", "Answers of the placement policy.", ("result",))
EXECUTOR_RESTARTS = Counter("rocyard_executor_restarts_total", "Executors started anew in their slot.", ("reason",))
LEADER = Gauge("rocyard_leader", "1 in the controller that leads, else 0.")
ROUNDS = Counter("rocyard_rounds_total", "Rounds of the leading controller.")
ROUND_DURATION = Histogram("rocyard_round_duration_seconds", "Time of one round of the controller.", buckets=_FAST)

# The cluster as a whole, by the leading controller alone.
NODES = Gauge("rocyard_nodes", "Registered nodes by state; one that left is none.", ("state",))
STORE_UNSYNCED = Gauge("rocyard_store_unsynced", "1 where the store is known not to sync each write to disk, else 0.")

# What the autoscaler decides from, by the leading controller alone; and what it decides.
GROUP_NEED = Gauge("rocyard_group_need_nodes", "Nodes that the group should have for the work that there is.", ("group",))
GROUP_NEED_ROUND = Gauge("rocyard_group_need_round", "Changes whenever the need is computed.", ("group",))
GROUP_NODES = Gauge("rocyard_group_nodes", "Nodes of the group that are registered, by state.", ("group", "state"))
INFEASIBLE_TASKS = Gauge("rocyard_infeasible_tasks", "Waiting tasks that no node could ever hold.", ("reason",))
AUTOSCALER_SIZE = Gauge("rocyard_autoscaler_size_nodes", "Nodes of the group, those that start included.", ("group",))
AUTOSCALER_TARGET = Gauge("rocyard_autoscaler_target_nodes", "Nodes that the group is brought to.", ("group",))
AUTOSCALER_METRICS_KNOWN = Gauge("rocyard_autoscaler_metrics_known", "1 while the need is known by metrics, else 0.")
AUTOSCALER_ACTIONS = Counter("rocyard_autoscaler_actions_total", "What was done, by kind and outcome.", ("action", "result"))

# Devices, as the agent reads them.
DEVICE_MEMORY_TOTAL = Gauge("rocyard_device_memory_total_bytes", "Memory of the device.", _DEVICE)
DEVICE_MEMORY_USED = Gauge("rocyard_device_memory_used_bytes", "Memory in use by any process.", _DEVICE)
DEVICE_MEMORY_LEASED = Gauge("rocyard_device_memory_leased_bytes", "Memory leased to slots.", _DEVICE)
DEVICE_MEMORY_FOREIGN = Gauge("rocyard_device_memory_foreign_bytes", "Memory in use by what is not ours.", _DEVICE)
DEVICE_HEALTHY = Gauge("rocyard_device_healthy", "1 while the device answers and can be used, else 0.", _DEVICE)
DEVICE_UTILISATION = Gauge("rocyard_device_utilisation_ratio", "Share of time the device computes, 0 to 1.", _DEVICE)

# The API.
API_REQUESTS = Counter("rocyard_api_requests_total", "Requests by route, not by path.", ("method", "route", "status"))
API_REQUEST_DURATION = Histogram(
    "rocyard_api_request_duration_seconds", "Time of one request, waiting included.", ("route",), buckets=_LONG
)

# The store, as each process sees it.
STORE_RECONNECTS = Counter("rocyard_store_reconnects_total", "Connections to the store made anew.")
STORE_ERRORS = Counter("rocyard_store_errors_total", "Calls to the store that failed.", ("kind",))
STORE_REFUSED = Gauge("rocyard_store_refused", "1 while this process refuses the store, by reason.", ("reason",))

# What should not happen, and is survived.
LOOP_ERRORS = Counter("rocyard_loop_errors_total", "Exceptions that reached the top of a loop.", ("loop",))
HOOK_ERRORS = Counter("rocyard_hook_errors_total", "Exceptions that reached the top of a Dask hook.", ("hook",))
PROCESS_RESTARTS = Counter("rocyard_process_restarts_total", "Processes started again after an exit.", ("process",))


def one_of(value: str, allowed: frozenset[str]) -> str:
    """`value` if it is `allowed` as a label, else ``other``."""
    return value if value in allowed else OTHER


def exposition() -> tuple[bytes, str]:
    """All metrics as text, and the content type of that text; for a process that has an HTTP server of its own."""
    return prometheus_client.generate_latest(REGISTRY), prometheus_client.CONTENT_TYPE_LATEST


def serve_metrics(host: str, port: int, context: ssl.SSLContext | None = None) -> tuple[int, Callable[[], None]]:
    """Serve ``/metrics`` on `host` alone, from daemon threads.

    Args:
        host: the address to bind.
        port: a TCP port; 0 takes any free one.
        context: for TLS, and then for nothing else.

    Returns:
        The port, and a function that ends the server.

    Raises:
        StartError: the address cannot be bound.
    """
    try:
        server = _Server((host, port), _Handler.factory(REGISTRY))
    except OSError as error:
        raise StartError(f"metrics cannot listen on {host}:{port}: {error.strerror}", host=host, port=port) from error
    if context is not None:
        # The handshake comes with the first read, in the connection's own thread: who delays it delays nobody.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=2.0)

    return int(server.server_address[1]), close


class _Handler(MetricsHandler):
    timeout = 10  # a peer that says nothing must not hold a thread


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A peer that breaks off, or speaks no TLS, is no news for the log."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # as it was given to us

    def server_bind(self) -> None:
        # Not HTTPServer's: that one asks the DNS for the host's name, which may take many seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
