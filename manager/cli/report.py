"""How an error is told on stderr: to a person in words, to a program as one JSON object. docs/cli.md has its form."""

import shutil
import sys
from collections.abc import Mapping

import click
import msgspec

from manager.core.errors import RocyardError


def report(error: RocyardError, *, as_json: bool, task: str | None = None) -> int:
    """Tell `error`; its exit code.

    Args:
        task: which of several tasks it is about, as it was named.
    """
    from manager.cli.exits import exit_of
    from manager.cli.text import plain, wrapped

    code = exit_of(error)
    if as_json:
        report_json(error.code, str(error), code, error.details if task is None else {"task": task, **error.details})
        return code
    words = str(error) if task is None else f"{task}: {error}"
    texts = [f"error: {plain(words)}", *(plain(note) for note in getattr(error, "__notes__", ()))]
    wide = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    head, *rest = "\n".join(texts if wide is None else (wrapped(text, wide) for text in texts)).split(":", 1)
    click.echo(click.style(f"{head}:", fg="red", bold=True) + "".join(rest), err=True)
    return code


def report_json(code: str, message: str, exit_code: int, details: Mapping[str, object]) -> None:
    """Tell an error to a program."""
    body = {"code": code, "message": message, "exit": int(exit_code), **details}
    click.echo(msgspec.json.encode({"error": body}, enc_hook=str).decode(), err=True)
