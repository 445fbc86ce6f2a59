"""What an executor runs for a Dask task: it reads the call from a file, and writes what came of it to another.

Runs in the agent's own interpreter, which has what Dask clients have. Imports late what only some calls need: each of them
pays for a start.
"""

import pickle
import sys
from pathlib import Path
from types import CoroutineType
from typing import Any, Final

import cloudpickle  # type: ignore[import-untyped]

PART: Final = ".part"
"""Ends the name of a result that is being written. One whose writer was killed is whoever's that asked for the result."""


def run_call(call: str, result: str) -> bool:
    """Run a pickled call.

    Args:
        call: file with two pickles: the import path of who made the call, and a callable without arguments.
        result: where to write ``(True, value)`` or ``(False, exception)``; it is there whole or not at all.

    Returns:
        Whether there is a value.
    """
    try:
        with Path(call).open("rb") as file:
            sys.path += [entry for entry in pickle.load(file) if entry not in sys.path]  # noqa: S301  # who may use Dask may run code
            function = pickle.load(file)  # noqa: S301  # as above
        value = function()
        if type(value) is CoroutineType:
            import asyncio  # 20 ms that only coroutine functions need

            value = asyncio.run(value)
        _write(result, (True, value))
    except BaseException as error:
        if type(error).__name__ == "TaskTerminated":  # the agent ends us: there is no outcome
            raise
        _write_error(result, error)
        return False
    return True


def _write(result: str, outcome: tuple[bool, Any]) -> None:
    part = Path(result + PART)
    with part.open("wb") as file:
        cloudpickle.dump(outcome, file, protocol=5)
    part.replace(result)


def _write_error(result: str, error: BaseException) -> None:
    """The exception with its traceback and causes; where its class cannot travel, its text."""
    import tblib.pickling_support  # type: ignore[import-untyped]

    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next  # without our own frame
    if isinstance(error, SystemExit | KeyboardInterrupt):  # in the Dask worker these would mean the worker
        error = RuntimeError(f"the function raised {type(error).__name__}({error})").with_traceback(error.__traceback__)
    try:
        tblib.pickling_support.install(error)
        pickle.loads(cloudpickle.dumps(error, protocol=5))  # noqa: S301  # our own
        _write(result, (False, error))
    except Exception:  # noqa: BLE001  # the class is the user's: it may do anything here
        import traceback

        text = "".join(traceback.format_exception(error)[-20:])
        _write(result, (False, RuntimeError(f"{type(error).__name__}: {error} (it cannot be pickled)\n{text}")))
