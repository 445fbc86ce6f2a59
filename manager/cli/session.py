"""What every command shares: its common options, the client, the settings, and how answers are printed.

This is where the environment is read. Owns stdout (answers) and stderr (everything else).
"""

import enum
import errno
import functools
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import msgspec

from manager.core.errors import BadRequest

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from manager.client import Client
    from manager.client_address import ClusterAddress
    from manager.settings import Settings

PIPE_COLUMNS: Final = 160
"""Width where nobody looks: tables are cut less than on a screen."""

COMMON: Final = frozenset({"output", "url", "config", "overrides"})
"""Names of the parameters that a command does not see: they are its session's."""

T = TypeVar("T")


class Output(enum.StrEnum):
    """How answers are printed."""

    TABLE = "table"
    JSON = "json"


class Options(msgspec.Struct, frozen=True):
    """The common options of one call."""

    output: Output = Output.TABLE
    url: str | None = None
    config: Path | None = None
    overrides: tuple[tuple[str, str], ...] = ()


class CommonOption(click.Option):
    """An option that stands in every command's help, below its own."""


class Command(click.Command):
    """A command whose common options stand in a section of their own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own: list[tuple[str, str]] = []
        common: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                (common if isinstance(param, CommonOption) else own).append(record)
        for title, records in (("Options", own), ("Common options", common)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _split_override(_ctx: click.Context, _param: click.Parameter, values: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{text!r} is not SECTION.KEY=VALUE, such as api.port=8001")
        pairs.append((key.strip(), value))
    return tuple(pairs)


def common_options(*, client: bool, settings: bool) -> list[click.Parameter]:
    """The options that a command of that kind takes besides its own."""
    options: list[click.Parameter] = [
        CommonOption(
            ["-o", "--output"],
            type=click.Choice([kind.value for kind in Output]),
            help="How answers are printed: for people (table) or for programs.",
        )
    ]
    if client:
        options.append(CommonOption(["--url"], help="The cluster, else $ROCYARD_URL, else the one on this machine."))
    if settings or client:
        options += [
            CommonOption(["--config"], type=click.Path(path_type=Path), help="Settings file (YAML)."),
            CommonOption(
                ["--set", "overrides"],
                multiple=True,
                callback=_split_override,
                metavar="SECTION.KEY=VALUE",
                help="One setting; may be given several times.",
            ),
        ]
    return options


def command(
    name: str, *, client: bool = False, settings: bool = False, hidden: bool = False
) -> Callable[[Callable[..., int]], Command]:
    """Make a command of a function that takes a `Session` first and returns an exit code.

    Options that stood before the command's name count too; those after it win.
    """

    def decorate(function: Callable[..., int]) -> Command:
        @functools.wraps(function)
        def run(**given: Any) -> int:
            options = options_of(click.get_current_context())
            own = {name: value for name, value in given.items() if name not in COMMON}
            return function(Session(options, os.environ), **own)

        params = list(reversed(getattr(function, "__click_params__", [])))
        return Command(
            name=name,
            callback=run,
            params=params + common_options(client=client, settings=settings),
            help=function.__doc__,
            hidden=hidden,
        )

    return decorate


def options_of(context: click.Context) -> Options:
    """The common options of a call, wherever they stood: what is nearer to the end of the command wins."""
    levels = [context.params]
    while context.parent is not None:
        context = context.parent
        levels.append(context.params)

    def last(name: str) -> Any:
        return next((level[name] for level in levels if level.get(name) is not None), None)

    return Options(
        output=Output(last("output") or Output.TABLE),
        url=last("url"),
        config=last("config"),
        overrides=tuple(pair for level in reversed(levels) for pair in level.get("overrides", ())),
    )


class Session:
    """One call of a command.

    Args:
        options: the common ones.
        environ: the environment.
    """

    def __init__(self, options: Options, environ: Mapping[str, str]) -> None:
        self.options = options
        self.environ = environ

    # --- what to work with --------------------------------------------------------------------------------------

    def settings(self) -> "Settings":
        """The settings, checked; what a person should know of them is told."""
        from manager.settings_load import read_settings

        loaded = read_settings(self.options.config, self.environ, dict(self.options.overrides))
        for text in loaded.notes:
            self.note(f"note: {text}")
        return loaded.settings

    def data_dir(self) -> Path:
        """The folder of the local cluster. The settings are only read where there is a file that may name another."""
        from manager.settings import Settings

        overrides = dict(self.options.overrides)
        named = "data_dir" in overrides or self.options.config or "ROCYARD_CONFIG" in self.environ
        if named or Path("rocyard.yaml").exists() or Path(".env").exists():
            from manager.settings_load import load_settings

            # No old name names this folder; what another program's .env says must not stop a command that only looks.
            environ = {**self.environ, "ROCYARD_OLD_NAMES": "false"}
            return Path(load_settings(self.options.config, environ, overrides).data_dir).expanduser()
        return Path(self.environ.get("ROCYARD_DATA_DIR") or Settings().data_dir).expanduser()

    def address(self, url: str | None = None, ca: str | None = None) -> "ClusterAddress":
        """The cluster that is meant; a command that has an option of its own for it gives `url` and `ca`."""
        from manager.client_address import find_cluster

        variables: dict[str, str] = dict(self.environ)
        if Path(".env").exists():
            from manager.settings_sources import read_dotenv

            variables = {**read_dotenv(Path(".env")), **variables}
        return find_cluster(url or self.options.url, None, variables, str(self.data_dir()), ca)

    def client(self) -> "Client":
        """A client of the cluster that is meant."""
        from manager.client import Client

        return Client(self.address())

    # --- what to print ------------------------------------------------------------------------------------------

    @functools.cached_property
    def console(self) -> "Console":
        """Stdout, for people. Colours only on a terminal, and not where NO_COLOR is set."""
        from rich.console import Console

        width = None if sys.stdout.isatty() or "COLUMNS" in self.environ else PIPE_COLUMNS
        return Console(highlight=False, width=width, emoji=False, markup=False)

    @property
    def wants_json(self) -> bool:
        """Whether answers are for programs."""
        return self.options.output is Output.JSON

    def emit(self, value: T, render: "Callable[[T], RenderableType]") -> None:
        """Print an answer: as JSON, or as `render` shows it."""
        if self.wants_json:
            print_json(value)
        else:
            self.console.print(render(value))

    def note(self, text: str) -> None:
        """Tell a person something that is no part of the answer."""
        from manager.cli.text import wrapped

        if not self.wants_json:
            wide = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
            click.echo(text if wide is None else wrapped(text, wide), err=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def read_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is, or that the file behind ``@FILE`` or stdin (``-``) holds.

    Raises:
        BadRequest: it is none.
    """
    source = "the arguments"
    if text == "-" or text.startswith("@"):
        source = "stdin" if text == "-" else text[1:]
        try:
            text = (_stdin() if text == "-" else Path(source).read_bytes()).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise BadRequest(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise BadRequest(f"{source}: not JSON ({error}); write an object such as '{{\"x\": 1}}'") from error
    if not isinstance(found, dict):
        raise BadRequest(f"{source}: must be a JSON object such as '{{\"x\": 1}}', not {text.strip()[:40]}")
    return found


def _stdin() -> bytes:
    if sys.stdin is None:  # the shell's <&-
        raise OSError(errno.EBADF, "it is closed")
    return sys.stdin.buffer.read()
