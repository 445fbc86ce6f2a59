"""The store's face: one typed method per function of the library, and the few plain records beside it, by who calls them."""

from collections.abc import Callable

from manager.core.keys import Keys
from manager.metrics import STORE_RECONNECTS
from manager.store.calls_agents import AgentCalls
from manager.store.calls_leader import LeaderCalls
from manager.store.calls_operators import OperatorCalls
from manager.store.calls_records import RecordCalls
from manager.store.calls_submit import SubmitCalls
from manager.store.calls_tasks import TaskCalls
from manager.store.calls_upkeep import UpkeepCalls
from manager.store.connection import StoreConnection
from manager.store.schema import Membership


class Store(SubmitCalls, TaskCalls, AgentCalls, OperatorCalls, LeaderCalls, RecordCalls, UpkeepCalls):
    """Typed calls over one connection, those of every role: who may write what stands in `manager.core.keys`."""


def connect(
    url: str,
    deadline_s: float,
    name: str,
    keys: Keys | None = None,
    on_reconnect: Callable[[], None] | None = None,
    membership: Membership | None = None,
) -> Store:
    """A store over a connection of its own, made at the first call; connections after the first are counted. `membership` says
    whether it is the right store: each process of a cluster has one.
    """

    def reconnected() -> None:
        STORE_RECONNECTS.inc()
        if on_reconnect is not None:
            on_reconnect()

    return Store(StoreConnection(url, deadline_s, name, reconnected, membership), keys)
