"""What a running function can say and ask of its own attempt: ``rocyard.progress``, ``rocyard.checkpoint`` and their kin.

Outside of an executor they check what they are given and do nothing, so that a function can be tested alone. This module
imports only the standard library: it runs in the interpreters of users. It knows no socket: what it is told goes to the
object that the executor has put into ``sys.modules`` (`plugins.node.executor_attempt`).
"""

import os
import sys
from typing import Any, Final

ATTEMPT: Final = "rocyard_attempt"
"""Name in ``sys.modules`` of what the executor tells of the attempt that runs now."""
CHECKPOINT_CHARS_MAX: Final = 1024
MESSAGE_CHARS_MAX: Final = 500
_ROUNDING: Final = 1e-6  # a sum of many small parts may pass 1 by so much


def progress(fraction: float, message: str = "") -> None:
    """Tell how far the task is, for whoever looks at it.

    Call it as often as you like: what comes too fast is left out, but never the last one.

    Args:
        fraction: 0 to 1, such as ``done / total``.
        message: a few words beside it; 500 characters of it are kept.

    Raises:
        ValueError: an argument is something else.
    """
    try:
        value = float(fraction)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"progress takes a number from 0 to 1, such as done / total, not {fraction!r:.100}") from None
    if not -_ROUNDING <= value <= 1 + _ROUNDING:  # not so for NaN
        raise ValueError(f"progress takes a number from 0 to 1, such as done / total, not {value!r}")
    if not isinstance(message, str):  # one kind of error for all that is wrong here, as the documentation has it
        raise ValueError(f"the message of progress is a text, not a {type(message).__name__}")  # noqa: TRY004
    if (running := _attempt()) is not None:
        running.report(progress=min(1.0, max(0.0, value)), message=_sendable(message)[:MESSAGE_CHARS_MAX])


def checkpoint(path: "str | os.PathLike[str]") -> None:
    """Have the next attempt, if there is one, find `path` in `last_checkpoint`.

    Call it after the file is complete. When it returns the node agent knows, and this process may die. Whether the file is
    still there by then is up to where it lies: `checkpoint_folder` is on storage that other nodes see too.

    Args:
        path: whatever names the checkpoint: a path, a URL, the number of a step. At most 1,024 characters.

    Raises:
        ValueError: it is no text, empty, or too long.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        raise ValueError(f"checkpoint takes a path as text, not a {type(path).__name__}") from None
    if not isinstance(text, str):
        raise ValueError("checkpoint takes a path as text, not as bytes: os.fsdecode makes it one")  # noqa: TRY004
    if not 0 < len(text) <= CHECKPOINT_CHARS_MAX:
        raise ValueError(f"the path of a checkpoint has 1 to {CHECKPOINT_CHARS_MAX} characters, this one has {len(text)}")
    if _sendable(text) != text:
        raise ValueError("the path of a checkpoint is text that has a UTF-8 form")
    if (running := _attempt()) is not None:
        running.report(checkpoint=text)


def last_checkpoint() -> "str | None":
    """What this attempt, or the last one before it that did, has given `checkpoint`; None: none has."""
    running = _attempt()
    return (running.checkpoint or None) if running is not None else None


def checkpoint_folder() -> "str | None":
    """A folder of this task's own for its checkpoints, which its next attempt sees wherever it runs; made at the first call.

    None where the cluster has no storage that all nodes share (``results.url``), and outside of an executor.
    """
    running = _attempt()
    if running is None or not running.folder:
        return None
    from pathlib import Path  # most functions start without it

    Path(running.folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(running.folder)


def array_index() -> "int | None":
    """The task's place in its array, from 0; None where it belongs to none."""
    running = _attempt()
    return running.index if running is not None and running.index >= 0 else None


def task_id() -> "str | None":
    """The id of the task that runs; None outside of an executor."""
    running = _attempt()
    return running.task_id if running is not None else None


def attempt() -> "int | None":
    """Which attempt of its task this is, from 1; None outside of an executor."""
    running = _attempt()
    return running.attempt if running is not None else None


def _attempt() -> Any:
    """The attempt that this very process runs: a process that it has started has none."""
    found: Any = sys.modules.get(ATTEMPT)
    return found if found is not None and found.task_id and found.pid == os.getpid() else None


def _sendable(text: str) -> str:
    """`text` without lone surrogates: they have no UTF-8 form."""
    return text.encode("utf-8", "replace").decode()
