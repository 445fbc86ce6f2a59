"""What a running function has reported, on its way from the executor to the store. Plain values; user code is not trusted."""

from typing import Final

from manager.core.model import ProgressNote
from manager.core.wire import Note

MESSAGE_CHARS_MAX: Final = 500
CHECKPOINT_CHARS_MAX: Final = 1024
"""Both as ``rocyard/task.py`` has them, which need not be what has sent the note: the function's process may send anything."""


def checked(note: Note) -> ProgressNote:
    """`note` within bounds. What no function can have reported is left out."""
    progress, checkpoint = note.progress, note.checkpoint
    if progress is not None and not 0 <= progress <= 1:  # so for NaN, too
        progress = None
    if checkpoint is not None and not 0 < len(checkpoint) <= CHECKPOINT_CHARS_MAX:
        checkpoint = None
    message = None if note.message is None else note.message[:MESSAGE_CHARS_MAX]
    return ProgressNote(note.task_id, note.attempt, progress, message, checkpoint)


def merged(old: ProgressNote, new: ProgressNote) -> ProgressNote:
    """Both in one, of the same task: the newer of each."""
    if old.attempt != new.attempt:
        return new
    return ProgressNote(
        new.task_id,
        new.attempt,
        old.progress if new.progress is None else new.progress,
        old.message if new.message is None else new.message,
        old.checkpoint if new.checkpoint is None else new.checkpoint,
    )
