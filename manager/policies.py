"""Placement policies by name: those that come with the product, and those of installed packages.

Owns how a name becomes a policy. What a policy must be is `manager.core.placement.Policy`.
"""

import difflib
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from manager.core.errors import SettingsError
from manager.core.placement import Policy
from manager.core.policies import POLICIES

ENTRY_POINT_GROUP: Final = "rocyard.policies"


def policy_named(name: str, installed: Iterable[EntryPoint] | None = None) -> Policy:
    """The policy of this name.

    Args:
        name: as the setting ``placement.policy`` has it.
        installed: entry points whose name is the policy's and whose value names the policy itself (an object with `name`
            and `scores`); those of `ENTRY_POINT_GROUP` if not given. Only the package of the one that is asked for is
            imported. A built-in name is never another's.

    Raises:
        SettingsError: there is none of this name, or it is no policy; says which there are.
    """
    if name in POLICIES:
        return POLICIES[name]
    points = list(entry_points(group=ENTRY_POINT_GROUP) if installed is None else installed)
    found = [point for point in points if point.name == name]
    if not found:
        known = policy_names(points)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise SettingsError(f"placement.policy: there is no policy {name[:70]!r}{hint}; there are {', '.join(known)}")
    origins = " and ".join(sorted(_origin(point) for point in found))
    if len({point.value for point in found}) > 1:
        raise SettingsError(f"placement.policy: {origins} have one name: uninstall one of them")
    try:
        policy = found[0].load()
    except Exception as error:  # whatever their package does when it is imported
        raise SettingsError(f"placement.policy: {origins} cannot be loaded: {type(error).__name__}: {error}") from error
    if getattr(policy, "name", None) != name or not callable(getattr(policy, "scores", None)) or isinstance(policy, type):
        raise SettingsError(f"placement.policy: {origins} is no policy: an object with name={name!r} and a method scores")
    loaded: Policy = policy
    return loaded


def policy_names(installed: Iterable[EntryPoint] | None = None) -> list[str]:
    """The names of all policies that there are: those of the product, then those of installed packages."""
    points = entry_points(group=ENTRY_POINT_GROUP) if installed is None else installed
    return [*POLICIES, *sorted({point.name for point in points} - POLICIES.keys())]


def _origin(point: EntryPoint) -> str:
    return f"entry point {point.name!r} of {point.dist.name if point.dist is not None else 'a package'}"
