"""What an operation of the API is: one value per route, from which the routes, the access checks and the OpenAPI document
are made. There is no way to a handler that is not declared here, and none without a declared access.
"""

from collections.abc import Awaitable, Callable
from typing import Final, Literal

import msgspec

from manager.api.exchange import Call, Reply
from manager.core.errors import BadRequest, Forbidden, RocyardError, StoreUnavailable, Unauthorized
from manager.core.requests import KeyScope

Handler = Callable[[Call], Awaitable[Reply]]


class Public(msgspec.Struct, frozen=True):
    """Anybody may ask, without a key."""


Access = Public | KeyScope
"""Who may: anybody, or a key that may do what the scope may."""
PUBLIC: Final = Public()


class Parameter(msgspec.Struct, frozen=True):
    """A query parameter. `most` is the largest whole number that it takes, from 1."""

    name: str
    description: str
    type: Literal["string", "integer", "boolean"] = "string"
    choices: tuple[str, ...] = ()
    most: int = 0


class Header(msgspec.Struct, frozen=True):
    """A header that a request may have."""

    name: str
    description: str


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method on one path.

    Attributes:
        name: unique; the operationId.
        path: with ``{parameters}``.
        access: who may.
        handler: does it; never called without the access.
        status: of success.
        answer: the body of success; None where it is no JSON of ours.
        body: the request's body, if it has one.
        query: parameters it takes; others are refused.
        headers: that it minds beside those that all do.
        errors: what it may answer besides success, access errors aside.
        listed: whether the OpenAPI document shows it.
    """

    name: str
    method: Literal["GET", "POST", "DELETE"]
    path: str
    access: Access
    summary: str
    handler: Handler
    status: int = 200
    answer: type | None = None
    answer_type: str = "application/json"
    body: type | None = None
    query: tuple[Parameter, ...] = ()
    headers: tuple[Header, ...] = ()
    errors: tuple[type[RocyardError], ...] = ()
    listed: bool = True

    def all_errors(self) -> tuple[type[RocyardError], ...]:
        """With those that follow from its access, body and query."""
        found = list(self.errors)
        if not isinstance(self.access, Public):
            found += [Unauthorized, Forbidden, StoreUnavailable]
        if self.query or self.body is not None:
            found.append(BadRequest)
        return tuple(dict.fromkeys(found))
