"""`rocyard`: the table of commands, and the one place where errors become messages and exit codes.

A command's module is only imported when the command runs, so that help and simple commands start fast.
"""

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

import click
import msgspec

from manager.cli.report import report, report_json
from manager.cli.session import Output, common_options
from manager.core.errors import BadRequest, RocyardError


class Entry(msgspec.Struct, frozen=True):
    """A command: where it is, and its line in the help."""

    target: str
    summary: str


CLUSTER: Final = "manager.cli.cluster"
TASKS: Final = "manager.cli.tasks"
PROCESSES: Final = "manager.cli.processes"
WORKERS: Final = "manager.cli.workers"
FORESIGHT: Final = "manager.cli.foresight"

SECTIONS: Final[dict[str, dict[str, Entry]]] = {
    "A cluster on this machine": {
        "up": Entry(f"{CLUSTER}:up", "Start one; Ctrl-C stops it"),
        "down": Entry(f"{CLUSTER}:down", "Stop it"),
        "demo": Entry(f"{CLUSTER}:demo", "Train and classify handwritten digits, as tasks"),
    },
    "Tasks": {
        "submit": Entry(f"{TASKS}:submit", "Submit one"),
        "tasks": Entry(f"{TASKS}:tasks", "List them"),
        "show": Entry(f"{TASKS}:show", "All about one, with its result"),
        "result": Entry(f"{TASKS}:result", "What one has returned, of any size"),
        "attempts": Entry(f"{TASKS}:attempts", "Where one was tried, and why that ended"),
        "logs": Entry(f"{TASKS}:logs", "What one has written, or writes"),
        "explain": Entry(f"{TASKS}:explain", "Why one is where it is"),
        "plan": Entry(f"{FORESIGHT}:plan", "What would happen to one that is not submitted"),
        "cancel": Entry(f"{TASKS}:cancel", "End some"),
        "functions": Entry(f"{TASKS}:functions", "What tasks can run"),
    },
    "Nodes and slots": {
        "cordon": Entry(f"{WORKERS}:cordon", "Nothing new on a node"),
        "uncordon": Entry(f"{WORKERS}:uncordon", "Let it take on work again"),
        "drain": Entry(f"{WORKERS}:drain", "Empty a node, and remove it if asked"),
        "warm": Entry(f"{WORKERS}:warm", "Keep slots open ahead of need"),
        "unload": Entry(f"{WORKERS}:unload", "Close idle slots, with their models"),
    },
    "The cluster": {
        "status": Entry(f"{CLUSTER}:status", "Tasks, devices and problems"),
        "top": Entry("manager.cli.top:top", "The same, live"),
        "workers": Entry(f"{CLUSTER}:workers", "Nodes and their devices"),
        "tenants": Entry("manager.cli.tenants:tenants", "What each has at work, and may have"),
        "keys": Entry("manager.cli.keys:keys", "Make, list and revoke API keys"),
        "certs": Entry("manager.cli.certs:certs", "Make the certificates for TLS"),
        "doctor": Entry("manager.cli.doctor:doctor_command", "What is wrong here, and what to do about it"),
        "backup": Entry("manager.cli.backup:backup", "A copy of the store as a file, while it runs"),
        "restore": Entry("manager.cli.backup:restore", "Bring a backup's data back, into an empty store"),
        "snapshot": Entry(f"{FORESIGHT}:snapshot", "All that decides about placement now, as a file"),
        "replay": Entry(f"{FORESIGHT}:replay", "Decide again on a snapshot, under any policy"),
        "autoscaler": Entry("manager.cli.autoscaler:autoscaler", "Adds and removes nodes: its process, and its decisions"),
        "version": Entry(f"{CLUSTER}:version", "Versions of Rocyard and of what it runs on"),
    },
    "Its processes, each alone": {
        "store": Entry(f"{PROCESSES}:store", "The embedded store"),
        "scheduler": Entry(f"{PROCESSES}:scheduler", "The Dask scheduler"),
        "controller": Entry(f"{PROCESSES}:controller", "The controller"),
        "node": Entry("manager.cli.join:node", "A node's agent: on each machine with devices"),
        "api": Entry(f"{PROCESSES}:api", "The REST API"),
    },
}
COMMANDS: Final = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class Root(click.Group):
    """The command `rocyard`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 -- as above
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, _, name = entry.target.partition(":")
        found = getattr(import_module(module), name)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else " 'rocyard --help' lists all."
            raise click.UsageError(f"There is no command '{args[0]}'.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 -- as above
        width = max(len(name) for name in COMMANDS)
        for title, entries in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), entry.summary) for name, entry in entries.items()])


@click.group(
    cls=Root,
    params=common_options(client=True, settings=True),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="'rocyard COMMAND --help' says more. Exit codes stand in docs/cli.md.",
)
def root(**_common: object) -> None:
    """Run tasks on a cluster of GPUs that is shared by memory."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    from manager.cli.exits import Exit

    args = list(sys.argv[1:] if argv is None else argv)
    _stand_any_terminal()
    for word in args:
        if not _is_text(word):
            return report(BadRequest(f"{word!r} is not UTF-8; write it in UTF-8."), as_json=_asked_for_json(args))
    try:
        code = root.main(args=args, prog_name="rocyard", standalone_mode=False)
    except click.ClickException as error:
        if _asked_for_json(args):
            report_json("Usage", error.format_message(), Exit.USAGE, {})
        else:
            error.show()
        return Exit.USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return Exit.INTERRUPTED
    except RocyardError as error:
        return report(error, as_json=_asked_for_json(args))
    except BrokenPipeError:
        # Whoever read our stdout has gone (`rocyard tasks | head`): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    return code if isinstance(code, int) else Exit.OK


def _stand_any_terminal() -> None:
    """Where stdout has no sign for a character (a terminal that is not UTF-8), it shows ``?`` and nothing fails."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _is_text(word: str) -> bool:
    """Whether an argument can be sent on; bytes that are no text come in as lone surrogates."""
    return not any("\ud800" <= sign <= "\udfff" for sign in word)


def _asked_for_json(args: Sequence[str]) -> bool:
    """Whether errors go to a program. The command may not even have been parsed, so its words are looked at."""
    pairs = zip(args, [*args[1:], ""], strict=True)
    return any(
        word in {"--output=json", "-ojson"} or (word in {"-o", "--output"} and following == Output.JSON)
        for word, following in pairs
    )


if __name__ == "__main__":
    sys.exit(main())
