"""The environment of one slot's executor: exactly its devices, a home of its own, nothing else of the agent's."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from manager.core.devices import Device
from plugins.node.devices.interface import VISIBILITY_VARIABLES
from plugins.node.devices.probe import Prober
from plugins.node.executors import scrubbed_environment


class SlotEnvironment:
    """Makes environments for slots on this node's devices."""

    def __init__(self, devices: Sequence[Device], prober: Prober, environ: Mapping[str, str]) -> None:
        self.devices = {device.uuid: device for device in devices}
        self.prober = prober
        self.environ = environ

    def __call__(self, uuids: tuple[str, ...], home: Path) -> dict[str, str]:
        """All variables of an executor that may use `uuids`."""
        visible = self.prober.visibility([self.devices[uuid] for uuid in uuids])
        base = {name: value for name, value in self.environ.items() if name not in VISIBILITY_VARIABLES}
        return scrubbed_environment(base, {"HOME": str(home), "ROCYARD_DEVICES": ",".join(uuids), **visible})
