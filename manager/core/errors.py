"""One tree of errors, each with its HTTP status and whether asking again can help.

    RocyardError
    ├── BadRequest             400   UnknownField, BadCursor …: the request itself is wrong
    ├── Unauthorized           401   no key, or not a valid one
    ├── Forbidden              403   the key lacks the scope
    ├── NotFound               404   no such thing for this tenant
    │   └── FunctionNotFound   404   lists near names
    ├── ResultMissing          410   the file of a large result is gone
    ├── TooLarge               413   a body or arguments over the limit
    ├── UnsupportedMediaType   415
    ├── Unprocessable          422   well-formed, but cannot be done
    │   ├── InvalidArguments   422   arguments against the function's schema
    │   ├── Infeasible         422   more than any device could ever hold
    │   ├── IdempotencyConflict 422  the key was used for another request
    │   ├── NameTaken          422   the name is another task's
    │   ├── UnknownDependency  422   there is no such task to come after
    │   └── DeadlinePassed     422   the time by which it must have ended is over
    ├── QuotaExceeded          429   retry helps
    ├── StoreUnavailable       503   retry helps
    │   ├── StoreNew           503   retry helps once a controller has started
    │   ├── StoreReplaced      503   retry helps once the right data are back
    │   └── StoreTooNew        503   this process must be replaced by a newer one: exit 2
    ├── StoreFull              503   retry helps once there is room
    ├── RegistrationRefused    –     an agent's inventory cannot be right
    ├── ResultNotStored        –     a large result could not be kept: its task's error
    ├── SettingsError          –     a start with wrong settings: exit 2
    ├── StartError             –     a part that cannot start: port taken, program missing
    ├── LastAdminKey           409   manager/keys.py: it may not be revoked
    ├── ClusterUnreachable     –     manager/client_errors.py, as all below: what only a client can tell its caller
    ├── TaskFailed             –
    ├── TaskCancelled          –
    ├── NotFinished            –
    ├── WaitTimeout            –
    └── UnexpectedAnswer       –

The API has some of its own beside these (``manager/api/problems.py``), devices one (`DeviceError`), tasks of Dask clients four
below `GpuTaskError` (``manager/core/gpu_tasks.py``).

A class's docstring is its default message. Nothing here knows HTTP beyond the status number.
"""

from typing import Any, ClassVar


class RocyardError(Exception):
    """Something went wrong in Rocyard."""

    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message or (type(self).__doc__ or type(self).__name__).strip().splitlines()[0])
        self.details = details

    @property
    def code(self) -> str:
        """The PascalCase name that clients match on."""
        return type(self).__name__


class BadRequest(RocyardError):
    """The request cannot be read."""

    status = 400


class Unauthorized(RocyardError):
    """Send a valid key: 'Authorization: Bearer ry_…' (make one with: rocyard keys create --tenant NAME)."""

    status = 401


class Forbidden(RocyardError):
    """This key may not do that."""

    status = 403


class NotFound(RocyardError):
    """There is nothing here by that name."""

    status = 404


class FunctionNotFound(NotFound):
    """No function is registered by that name."""


class ResultMissing(RocyardError):
    """The task has succeeded, but the file of its result is not there any more."""

    status = 410


class ResultNotStored(RocyardError):
    """The result could not be stored."""


class TooLarge(RocyardError):
    """The request is larger than the limit."""

    status = 413


class UnsupportedMediaType(RocyardError):
    """Send 'Content-Type: application/json'."""

    status = 415


class Unprocessable(RocyardError):
    """The request is well-formed but cannot be done."""

    status = 422


class InvalidArguments(Unprocessable):
    """The arguments do not fit the function."""


class Infeasible(Unprocessable):
    """No device of this cluster could ever hold that."""


class IdempotencyConflict(Unprocessable):
    """This Idempotency-Key was used for another request within the last day. Use a new key for a new request."""


class NameTaken(Unprocessable):
    """Another task of yours has this name."""


class UnknownDependency(Unprocessable):
    """A task is to come after one that there is not."""


class DeadlinePassed(Unprocessable):
    """The time by which the task must have ended is over."""


class QuotaExceeded(RocyardError):
    """The tenant has reached its limit."""

    status = 429
    retryable = True


class StoreUnavailable(RocyardError):
    """The store does not answer; nothing was accepted. Try again."""

    status = 503
    retryable = True


class StoreNew(StoreUnavailable):
    """The store is new and has no identity yet: it gets one when a controller starts, or 'rocyard up'."""


class StoreReplaced(StoreUnavailable):
    """The store is empty or another cluster's; nothing is read or written until the right data are back."""


class StoreTooNew(StoreUnavailable):
    """The store's data are newer than this process can work with."""

    retryable = False


class StoreFull(RocyardError):
    """The store has no memory left for new work; running work can still end. Try again later."""

    status = 503
    retryable = True


class RegistrationRefused(RocyardError):
    """The node may not join as it is."""


class SettingsError(RocyardError):
    """The settings are wrong."""


class StartError(RocyardError):
    """A part of Rocyard cannot start."""
