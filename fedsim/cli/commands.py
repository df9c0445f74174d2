"""All commands by name, in the order of `fedsim --help`; wrong usage is one line, as a wrong config is."""

import inspect
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, NoReturn

import click
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from fedsim.base.version import VERSION
from fedsim.cli.federations import certificates, flower_app, node, nodes, serve
from fedsim.cli.inspection import check, list_, partition
from fedsim.cli.interrupts import Interrupted
from fedsim.cli.measurement import bench, export, profile
from fedsim.cli.runs import compare, resume, run, sweep
from fedsim.errors import ConfigError

COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "serve": serve,
    "node": node,
    "nodes": nodes,
    "app": flower_app,
    "resume": resume,
    "sweep": sweep,
    "partition": partition,
    "compare": compare,
    "check": check,
    "list": list_,
    "bench": bench,
    "profile": profile,
    "export": export,
    "certificates": certificates,
}
READ_CONFIGS = (run, serve, node, flower_app, resume, sweep, partition, bench, profile, export)
SHOWN_VERSIONS = ("torch", "flwr", "ray")
NoCode = Annotated[
    bool, typer.Option("--no-code", help="refuse a config that names code which does not come with fedsim")
]


class Commands(TyperGroup):
    """The commands; raises ConfigError for wrong usage, and SystemExit with the status otherwise."""

    def main(self, *arguments: Any, **options: Any) -> NoReturn:
        try:
            status = super().main(*arguments, **{**options, "prog_name": "fedsim", "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError:  # which has shown the help
            status = 2
        except click.NoSuchOption as error:
            raise ConfigError(_unknown_option(error)) from None
        except click.UsageError as error:
            name = error.ctx.command_path if error.ctx else "fedsim"
            raise ConfigError(f"{_words(error)}; {name} --help shows what there is") from None
        raise SystemExit(status or 0)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            from fedsim.base.catalogue import unknown

            raise ConfigError(unknown(args[0], self.commands))
        return super().resolve_command(ctx, args)


class Command(TyperCommand):
    """A command whose arguments have their help: typer 0.20, at which flwr holds it, loses it with click 8.5."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        assert self.callback is not None
        declared = inspect.signature(self.callback).parameters
        for parameter in self.params:
            if isinstance(parameter, TyperArgument) and parameter.name and not parameter.help:
                parameter.help = declared[parameter.name].annotation.__metadata__[0].help


def _words(error: click.UsageError) -> str:
    """Without the full stop, such as "--repeats: 0 is not in the range x>=1"."""
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{error.param.make_metavar(error.ctx)}: missing"  # type: ignore[arg-type]
    if isinstance(error, click.BadParameter) and error.param is not None:
        return f"{error.param.opts[0]}: {error.message.rstrip('.')}"
    if isinstance(error, click.BadOptionUsage):
        return f"{error.option_name}: needs a value"
    return error.format_message().rstrip(".")


def _unknown_option(error: click.NoSuchOption) -> str:
    """Its name, and where the command takes settings, how it is given as one: --local.lr=0.1 is local.lr=0.1."""
    from fedsim.base.catalogue import nearest
    from fedsim.experiment.config import keys_named

    name, context = error.option_name, error.ctx
    line = f"{name}: is no option of {context.command_path if context else 'fedsim'}"
    parameters = context.command.params if context else []
    options = [option for parameter in parameters for option in parameter.opts if option.startswith("--")]
    key, takes_settings = name.removeprefix("--"), any(parameter.name == "settings" for parameter in parameters)
    keys = [each for each in keys_named(key, {}) if each.split(".")[-1] == key] or [key] * ("." in key)
    if not (takes_settings and keys) and (meant := nearest(name, options)):
        return f"{line}; did you mean {meant[0]}?"
    if not (takes_settings and name.startswith("--")):
        return line
    at = next(i for i, word in enumerate(sys.argv) if word.partition("=")[0] == name)
    value = sys.argv[at].partition("=")[2] or next(iter(sys.argv[at + 1 :]), "VALUE")
    return f"{line}; a setting is given as {keys[0] if keys else key}={value}"


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated learning: simulate it, study non-IID data, take it to real machines.",
)


def _show_version(asked: bool) -> None:
    """Print one line: the version of fedsim, of Python, and of the packages on which most depends."""
    if asked:
        found = [f"Python {platform.python_version()}"]
        for package in SHOWN_VERSIONS:
            with suppress(PackageNotFoundError):  # an extra that is not installed
                found.append(f"{package} {version(package)}")
        print(f"fedsim {VERSION} ({', '.join(found)})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Options of `fedsim` itself."""


def _interruptible(function: Callable[..., None]) -> Callable[..., None]:
    """The same command, which an interrupt ends with `Interrupted`: typer's own status has no message."""

    @wraps(function)
    def call(**arguments: Any) -> None:
        try:
            function(**arguments)
        except KeyboardInterrupt:
            raise Interrupted from None

    return call


def _with_no_code(function: Callable[..., None]) -> Callable[..., None]:
    """The same command with the option --no-code; without it, each module that is not fedsim's is announced."""

    @wraps(function)
    def call(*, no_code: bool, **arguments: Any) -> None:
        from fedsim.base.own_code import Rule, own_code

        with own_code(Rule.REFUSED if no_code else Rule.ANNOUNCED):
            function(**arguments)

    signature = inspect.signature(function)
    option = inspect.Parameter("no_code", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=NoCode)
    parameters = [*signature.parameters.values(), option]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


for name, function in COMMANDS.items():
    app.command(name, cls=Command)(
        _interruptible(_with_no_code(function) if function in READ_CONFIGS else function)
    )
