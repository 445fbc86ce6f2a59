"""What the loop asks of whoever starts and ends nodes.

A provider's instance has the name of the node that it becomes. Every call names instances, so that a repeat is harmless; every
change bears the autoscaler's token, and a provider that can refuses one that is lower than any it has seen. A listing is whole
or it is an error: nothing is ever concluded from a part.
"""

from typing import Protocol

import msgspec


class ProviderUnavailable(Exception):
    """The provider does not answer, or not in full: nothing is known, so nothing may be concluded."""


class ProviderRefused(Exception):
    """The provider has understood and will not: a quota, a wrong name, a token that was replaced. Says why."""


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One node as its provider sees it.

    Attributes:
        name: of the instance and of its node.
        age_s: seconds since it was asked for.
        problem: why it does not start, as the provider says; empty where nothing is wrong.
    """

    name: str
    age_s: float
    problem: str = ""


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """All instances of one group, asked for or there, ordered by name as the provider counts them.

    Attributes:
        ordered: only the last ones can be removed (a StatefulSet's highest ordinals).
        version: the provider's mark of this state, handed back with a change so that one made meanwhile is not undone.
    """

    group: str
    instances: tuple[Instance, ...]
    ordered: bool = False
    version: str = ""


class Provider(Protocol):
    """Starts and ends nodes of the groups that name it."""

    async def list(self, group: str) -> Listing:
        """Everything that there is of the group.

        Raises:
            ProviderUnavailable: no answer, or not a whole one.
        """
        ...

    def new_names(self, listing: Listing, count: int) -> tuple[str, ...]:
        """Names of the next `count` instances. Pure: the same listing gives the same names."""
        ...

    async def add(self, listing: Listing, names: tuple[str, ...], token: int) -> None:
        """Start these, as `new_names` gave them for `listing`; those that are there already stay as they are.

        Raises:
            ProviderUnavailable: nothing is known of the outcome.
            ProviderRefused: it will not.
        """
        ...

    async def remove(self, listing: Listing, names: tuple[str, ...], token: int) -> None:
        """End these, which hold no work any more; with an `ordered` listing they are its last ones.

        Raises:
            ProviderUnavailable: nothing is known of the outcome.
            ProviderRefused: it will not.
        """
        ...

    async def close(self) -> None:
        """Let go of connections. Nodes stay."""
        ...
