"""The screen of tenants: what each has at work beside what it may have."""

from manager.cli.tenants import tenants_screen
from manager.core.answers_tenants import TenantView
from manager.core.quantities import GIB
from tests.unit.test_cli_screens import EVIL, shown


def tenant(**changes):
    values = {
        "tenant": "research",
        "tasks_active": 1200,
        "tasks_waiting": 1180,
        "tasks_running": 16,
        "gpus": 16,
        "memory_bytes": 384 * GIB,
        "active_tasks_max": 100_000,
        "running_tasks_max": None,
        "gpus_max": 16,
        "memory_bytes_max": 1024 * GIB,
        "weight": 3.0,
        "device_seconds": 12345.6,
    }
    return TenantView(**(values | changes))


def test_use_stands_beside_the_limit():
    text = " ".join(shown(tenants_screen([tenant()]), width=120).split())
    assert "research 1,180 16 16 of 16 384 GiB of 1 TiB 1,200 of 100,000 3 12,346 s" in text


def test_what_is_at_its_limit_stands_out():
    def style(row):
        (cell,) = list(tenants_screen([row]).columns[3].cells)
        return str(cell.style)

    assert (style(tenant()), style(tenant(gpus=15)), style(tenant(gpus_max=None))) == ("yellow", "", "")


def test_nobody_is_a_sentence_and_a_name_does_nothing():
    assert "No tenant" in shown(tenants_screen([]))
    assert "\x1b" not in shown(tenants_screen([tenant(tenant=EVIL, device_seconds=None)]), width=160)
