"""The `moewh` command: the group of all commands, each in the file of its name, which is loaded on first use.

Every failure is one line on stderr that states what is wrong and what to do, with exit code 1 when the work failed and
2 when the command was used wrongly. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Any

import click

from moewh.cli.completion import COMPLETE_VAR, register
from moewh.cli.failures import explain
from moewh.warehouse import __version__
from moewh.warehouse.errors import UsageError, one_line
from moewh.warehouse.stopping import stoppable

COMMANDS = (
    *("check", "completion", "demo", "export", "geometry", "import", "ingest", "inspect", "publish", "query"),
    *("refresh", "report", "runs", "seal", "shell", "show", "verify", "views"),
)


_ONE = frozenset(
    ("-c", "--domain", "--domain-column", "--layer", "--prompt", "--run", "--run-id", "--series", "--text-column")
)
"""Options of one value, given twice by those who mean both. Others may be repeated, and the last one counts."""


class MoewhGroup(click.Group):
    """A group of commands that reports failures as one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        """Return a command from the file of its name; None for an unknown one."""
        if cmd_name not in COMMANDS:
            return None
        name = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
        command: click.Command = getattr(import_module(f"moewh.cli.{name}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments name. Raises UsageError for an unknown one, with the nearest name."""
        import difflib

        near = difflib.get_close_matches(args[0], COMMANDS, 1, cutoff=0.7)
        if near and args[0] not in COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]}?")
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            _refuse_repeated(command, click.Context(command, ctx, name, **command.context_settings), rest)
        return name, command, rest

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and exit with its code; without `standalone_mode`, as click does."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        no_stdout = sys.stdout is None
        _open_closed_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        if COMPLETE_VAR in os.environ:
            register()
        try:
            with stoppable(lambda: "stopped before it was done."):
                code = super().main(args, prog_name, complete_var, False, **extra)
        except Exception as error:
            if (explained := explain(error)) is None:
                raise
            message, code = explained
            if no_stdout:
                _discard_output()
            click.echo(f"moewh: {one_line(message)}", err=True)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run one command; it ends quietly when its reader stops early (`| head`)."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _discard_output()
            ctx.exit(0)
        return result


def _refuse_repeated(command: click.Command, context: click.Context, words: list[str]) -> None:
    """Raise UsageError for one of _ONE that is given twice: click would take the last and drop the others.

    Raises click's UsageError for words that cannot be parsed.
    """
    try:
        _, _, given = command.make_parser(context).parse_args(list(words))
    except click.NoSuchOption as error:  # which names only `-m` of `-model`, and no command
        options = {name for option in command.params for name in option.opts}
        starts = (word.partition("=")[0] for word in words if word.startswith(error.option_name))
        meant = next((start for start in starts if f"-{start}" in options), error.option_name)
        raise click.NoSuchOption(meant, ctx=context) from error
    except click.UsageError as error:
        error.ctx = context
        raise
    for option in given:
        name = next((name for name in option.opts if name in _ONE), None)
        if name and not getattr(option, "multiple", False) and given.count(option) > 1:
            raise UsageError(f"{name} is given twice. Give it once.")


def _open_closed_streams() -> None:
    """Give closed standard streams (`>&-`) a descriptor that holds nothing and takes nothing.

    Without one, Python has None for them, and the next file that is opened gets their number: other output would go
    into it.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # writing an answer fails, as it would on the closed stream; messages are lost either way
            descriptor = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False))


def _discard_output() -> None:
    """Discard remaining output, so that the interpreter's last flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(
    "moewh",
    cls=MoewhGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="moewh", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """A SQL-queryable warehouse of the routing decisions of Mixture-of-Experts models."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


if __name__ == "__main__":
    main(prog_name="moewh")
