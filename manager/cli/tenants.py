"""The command about tenants, and its screen. It needs an admin key."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from manager.cli.exits import Exit
from manager.cli.session import Session, command

if TYPE_CHECKING:
    from rich.console import RenderableType

    from manager.core.answers_tenants import TenantView


@command("tenants", client=True)
def tenants(session: Session) -> int:
    """What each tenant has at work, and what it may have (with an admin key)."""
    with session.client() as client:
        session.emit(client.tenants(), tenants_screen)
    return Exit.OK


def tenants_screen(tenants: Sequence["TenantView"]) -> "RenderableType":
    """A row for each tenant; what is at its limit stands out."""
    from rich.text import Text

    from manager.cli.screens_tasks import plain_table
    from manager.cli.text import NONE, one_line
    from manager.core.quantities import format_memory

    def use(value: int, most: int | None, text: str, most_text: str) -> Text:
        full = most is not None and value >= most
        return Text(text if most is None else f"{text} of {most_text}", "yellow" if full else "")

    if not tenants:
        return Text("No tenant has unfinished tasks.")
    table = plain_table("TENANT", "WAITING", "RUNNING", "DEVICES", "MEMORY", "UNFINISHED", "WEIGHT", "HAS HAD")
    for row in tenants:
        memory = format_memory(row.memory_bytes) if row.memory_bytes else "0"
        memory_max = format_memory(row.memory_bytes_max or 0) if row.memory_bytes_max else ""
        table.add_row(
            Text(one_line(row.tenant, 24), "bold"),
            Text(f"{row.tasks_waiting:,}"),
            use(row.tasks_running, row.running_tasks_max, f"{row.tasks_running:,}", f"{row.running_tasks_max or 0:,}"),
            use(row.gpus, row.gpus_max, f"{row.gpus:,}", f"{row.gpus_max or 0:,}"),
            use(row.memory_bytes, row.memory_bytes_max, memory, memory_max),
            use(row.tasks_active, row.active_tasks_max, f"{row.tasks_active:,}", f"{row.active_tasks_max:,}"),
            Text(f"{row.weight:g}"),
            Text(NONE if row.device_seconds is None else f"{row.device_seconds:,.0f} s", "dim"),
        )
    return table
