"""The flags that say what a task or a slot needs, the same for every command that takes them."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import click

if TYPE_CHECKING:
    from manager.core.requests import Needs

_OPTIONS: Final = (
    click.option("-m", "--memory", metavar="SIZE", help="Memory on each device, such as 24GiB; else the function's default."),
    click.option("-g", "--gpus", type=click.IntRange(1, 64), help="Devices, all on one node; else the function's default."),
    click.option("--share", metavar="SHARE", help="Of the compute of each device, such as 50% or 0.5."),
    click.option(
        "--architecture", metavar="NAME", multiple=True, help="Such as gfx942, cdna3, gfx94*; given twice, any of them."
    ),
    click.option("--device-model", metavar="NAME", help="What the device is called, or a part of that, such as MI300X."),
    click.option("--label", "labels", metavar="NAME=VALUE", multiple=True, help="What the node's labels must be."),
    click.option("--cpus", type=click.FloatRange(min=0), help="CPUs of the node; 0.5 is half of one."),
    click.option("--host-memory", metavar="SIZE", help="Memory of the node, such as 32GiB."),
    click.option("--exclusive", is_flag=True, default=None, help="Nobody else may have anything on the devices."),
    click.option("--model", metavar="NAME", help="What should be loaded already where it is placed."),
)


def with_needs(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` with these flags."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def needs_of(given: Mapping[str, Any]) -> "Needs":
    """What these flags ask for; what was left out is left out.

    Raises:
        click.UsageError: a label has no value.
    """
    found = {name: value for name, value in given.items() if value is not None and value != ()}
    for name in ("memory", "host_memory"):
        if str(found.get(name, "")).isdecimal():
            found[name] = int(found[name])
    if labels := found.get("labels"):
        pairs = [label.partition("=") for label in labels]
        if missing := [name for name, sign, _ in pairs if not sign]:
            raise click.UsageError(f"--label: {missing[0]!r} is not NAME=VALUE, such as zone=a")
        found["labels"] = {name: value for name, _, value in pairs}
    return cast("Needs", found)  # the flags are called as its keys
