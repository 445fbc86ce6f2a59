"""The paths of the cluster manager that Rocyard replaces: the same operations under their old paths.

Each is made from its twin, so handler, access, parameters and answer are the same. The OpenAPI document shows the twins only.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from manager.api.operations import Operation

OLD_PATHS: Final = {
    "/v1/tasks": "/tasks",
    "/v1/tasks/{task_id}": "/tasks/{task_id}",
    "/v1/workers": "/workers",
    "/v1/cluster/status": "/cluster/status",
    "/livez": "/health",
}
"""Ours to the old one."""


def old_operations(operations: Iterable[Operation]) -> tuple[Operation, ...]:
    """The operations among `operations` that had another path, under that."""
    return tuple(
        msgspec.structs.replace(operation, name=f"old_{operation.name}", path=OLD_PATHS[operation.path], listed=False)
        for operation in operations
        if operation.path in OLD_PATHS
    )
