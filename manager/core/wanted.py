"""What is asked for: from what people write to `Resources`, and back to words.

The one place that parses and checks it, for REST, the CLI, the client, settings of functions and annotations of Dask tasks.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from manager.core.quantities import format_memory, parse_memory
from manager.core.requests import ARCHITECTURES_MAX, ResourceRequest
from manager.core.selectors import architectures_of, device_model_of, labels_of
from manager.core.shapes import CPU_MILLI_MAX, GPUS_MAX, SHARE_MILLI_MAX, Labels, Resources

_SHARE: Final = re.compile(r"\s*([0-9]{1,4}(?:\.[0-9]{1,9})?)\s*(%?)\s*")
_MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,199}")
_NOTHING: Final = ResourceRequest()


class WrongField(ValueError):
    """One field cannot be what was written. `field` names it as `ResourceRequest` does."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def resources_of(wanted: ResourceRequest, default: Resources | None = None) -> Resources:
    """What is asked for, in its one form: equal requests give equal resources.

    Args:
        wanted: as it was written.
        default: stands for what is left out; with none, memory must be named.

    Raises:
        WrongField: says what was wrong and what would be right.
    """
    if default is None:
        if wanted.memory is None:
            raise WrongField("memory", "is missing: write a size, such as '24GiB'")
        default = Resources(_read("memory", parse_memory, wanted.memory))
    if wanted == _NOTHING:
        return default
    named: dict[str, Any] = {}
    for field, (target, parse) in _PARSERS.items():
        value = getattr(wanted, field)
        if value is not None:
            named[target] = _read(field, parse, value)
    return msgspec.structs.replace(default, **named)


def words_of(resources: Resources) -> str:
    """What is asked for, for people: ``2 × 24 GiB on one node, gfx942 or gfx950, 50 % of the compute``."""
    memory = format_memory(resources.memory_bytes)
    where = memory if resources.gpus == 1 else f"{resources.gpus} × {memory} on one node"
    return f"{where}, {more}" if (more := more_words_of(resources)) else where


def more_words_of(resources: Resources) -> str:
    """What is asked for besides devices and their memory; empty: nothing."""
    parts: list[str] = []
    if resources.architectures:
        parts.append(" or ".join(resources.architectures))
    if resources.device_model:
        parts.append("device " + " or ".join(repr(name) for name in resources.device_model.split("|")))
    if resources.share_milli:
        parts.append(f"{resources.share_milli / 10:g} % of the compute")
    if resources.exclusive:
        parts.append("alone on the device" if resources.gpus == 1 else "alone on the devices")
    if resources.cpu_milli:
        parts.append(f"{resources.cpu_milli / 1000:g} CPUs")
    if resources.host_memory_bytes:
        parts.append(f"{format_memory(resources.host_memory_bytes)} of the host")
    if resources.labels:
        parts.append(text_of(resources.labels))
    if resources.model:
        parts.append(f"model {resources.model}")
    return ", ".join(parts)


def text_of(labels: Labels) -> str:
    """Labels as they are written in settings and flags: ``tier=spot,zone=a``."""
    return ",".join(f"{name}={value}" for name, value in labels)


def _read(field: str, parse: Callable[[Any], Any], value: Any) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise WrongField(field, str(error)) from None


def _gpus(value: int) -> int:
    if not 1 <= value <= GPUS_MAX:
        raise ValueError(f"{value} is not a number of devices: write a number from 1 to {GPUS_MAX}")
    return value


def _share(value: float | str) -> int:
    """Thousandths; what is not nothing is at least one of them."""
    right = "write a number from 0 to 1 such as 0.5, or a text such as '50%'"
    if isinstance(value, str):
        match = _SHARE.fullmatch(value)
        if match is None:
            raise ValueError(f"{value[:40]!r} is not a share of a device's compute: {right}")
        number = float(match[1]) / (100 if match[2] else 1)
    else:
        number = value
    if not 0 <= number <= 1:
        raise ValueError(f"{value!r} is not a share of a device's compute: {right}")
    return min(SHARE_MILLI_MAX, max(1, round(number * 1000))) if number else 0


def _architectures(value: str | Iterable[str]) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else list(value)
    if len(names) > ARCHITECTURES_MAX:
        raise ValueError(f"{len(names)} architectures are more than the {ARCHITECTURES_MAX} that one request may name")
    return architectures_of(names) if names != [""] else ()


def _labels(value: dict[str, str]) -> Labels:
    return labels_of(value.items())


def _cpus(value: float) -> int:
    if not 0 <= value <= CPU_MILLI_MAX / 1000:
        raise ValueError(f"{value!r} is not a number of CPUs: write one from 0 to {CPU_MILLI_MAX // 1000}, such as 4 or 0.5")
    return max(1, round(value * 1000)) if value else 0


def _host_memory(value: int | str) -> int:
    return 0 if value in {0, "0"} and value is not False else parse_memory(value)


def _model(value: str) -> str:
    if value and not _MODEL.fullmatch(value):
        raise ValueError(
            f"{value[:60]!r} cannot name a model: up to 200 letters, digits, '.', '_', '/', ':', '@', '+' and '-', "
            "a letter or digit first"
        )
    return value


_PARSERS: Final[dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "memory": ("memory_bytes", parse_memory),
    "gpus": ("gpus", _gpus),
    "share": ("share_milli", _share),
    "architecture": ("architectures", _architectures),
    "device_model": ("device_model", device_model_of),
    "labels": ("labels", _labels),
    "cpus": ("cpu_milli", _cpus),
    "host_memory": ("host_memory_bytes", _host_memory),
    "exclusive": ("exclusive", bool),
    "model": ("model", _model),
}
"""Field of a request → field of `Resources`, and how the one becomes the other."""
assert tuple(_PARSERS) == ResourceRequest.__struct_fields__
assert {target for target, _ in _PARSERS.values()} == set(Resources.__struct_fields__)
