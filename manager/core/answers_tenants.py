"""What the REST API gives of tenants and of their API keys. See `answers`."""

import msgspec

from manager.core.answers import Time
from manager.core.requests import KeyScope


class KeyView(msgspec.Struct, frozen=True, kw_only=True):
    """An API key, without its secret."""

    key_id: str
    tenant: str
    scope: KeyScope
    created_at: Time
    revoked_at: Time | None = None


class KeyCreated(KeyView, frozen=True, kw_only=True):
    """A new API key. `key` is shown this once: only its hash is kept."""

    key: str


class KeyList(msgspec.Struct, frozen=True):
    """All API keys, by id."""

    keys: tuple[KeyView, ...]


class TenantView(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant: what it has, what it may have, and its part where room is short. A limit of null is none.

    Attributes:
        tasks_active: not finished: those that wait, run, or are to be tried again.
        gpus: devices of its slots at work, each slot's counted for itself; an idle slot's are not.
        memory_bytes: device memory that these slots lease together.
        weight: with twice the weight it gets twice as much as another, where both want more than there is.
        device_seconds: what it has had, by its weight and beside that of others; null where nothing of it is unfinished.
    """

    tenant: str
    tasks_active: int
    tasks_waiting: int
    tasks_running: int
    gpus: int
    memory_bytes: int
    active_tasks_max: int
    running_tasks_max: int | None
    gpus_max: int | None
    memory_bytes_max: int | None
    weight: float
    device_seconds: float | None


class TenantList(msgspec.Struct, frozen=True):
    """Tenants with unfinished tasks, and those that the settings name, by name."""

    tenants: tuple[TenantView, ...]
