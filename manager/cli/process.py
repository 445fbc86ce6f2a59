"""One process of a cluster, as the supervisor starts it: ``python -m manager.cli.process ROLE``, settings on stdin."""

import sys

import msgspec

from manager.core.errors import RocyardError, StoreTooNew
from manager.core.lifecycle import OUTDATED_EXIT
from manager.settings import Settings


def run_role(role: str, settings: Settings) -> int:
    """Run one role until it is told to stop; each imports only what it needs."""
    if settings.tls.directory:
        from manager.tls import Role, settings_for

        settings = settings_for(settings, Role(role))
    match role:
        case "api":
            from manager.api.serve import serve

            serve(settings)
            return 0
        case "controller":
            from manager.controller import run as run_controller
            from plugins.slot import run_slot

            return run_controller(settings, run_slot)
        case "scheduler":
            from manager.policies import policy_named
            from plugins.scheduler_process import run as run_scheduler

            return run_scheduler(settings, policy_named(settings.placement.policy))
        case "node":
            from plugins.node.process import run as run_node

            return run_node(settings)
        case "autoscaler":
            from autoscaler.process import run as run_autoscaler

            return run_autoscaler(settings)
        case _:
            raise ValueError(f"there is no role {role!r}: api, autoscaler, controller, scheduler or node")


def main() -> int:
    """Read the settings and run the role."""
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)
    try:
        return run_role(sys.argv[1], settings)
    except RocyardError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return OUTDATED_EXIT if isinstance(error, StoreTooNew) else 1


if __name__ == "__main__":
    sys.exit(main())
