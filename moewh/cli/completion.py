"""Shell completion: the words before the cursor in, what may come next out. `moewh completion bash` prints the set-up.

click completes commands, options and choices. Here is what only moewh knows: queries, views, runs, layers, and the
parameters of a query. None of it opens a warehouse: names are those of files and folders. Where nothing is known, the
shell completes files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import click
from click import shell_completion as shells
from click.shell_completion import CompletionItem

from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.query import Query
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import SCHEMA_RUN, Layout

Items = list[CompletionItem[str]]
Complete = Callable[[click.Context, click.Parameter, str], Items]
"""What click calls with the words before the cursor, parsed, and the word at the cursor."""

COMPLETE_VAR = "_MOEWH_COMPLETE"
"""The environment variable by which a shell's script asks for completions."""
ASSIGNMENT = "assignment"
"""The type of `name=`, after which the shell sets no space."""

_BASH = """
%(complete_func)s() {
    local IFS=$'\\n' type value
    COMPREPLY=()
    while IFS=',' read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            assignment) compopt -o nospace; COMPREPLY+=("$value") ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" COMP_BREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1" 2>/dev/null)
}
complete -F %(complete_func)s %(prog_name)s
"""
_ZSH = """#compdef %(prog_name)s
%(complete_func)s() {
    local type value help
    local -a plain described assignments
    env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) %(complete_var)s=zsh_complete ${words[1]} 2>/dev/null |
    while read -r type && read -r value && read -r help; do
        case $type in
            dir) _path_files -/ ;;
            file) _path_files -f ;;
            assignment) assignments+=("$value") ;;
            plain) if [[ $help == _ ]]; then plain+=("$value"); else described+=("$value:$help"); fi ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described -U
    (( $#plain )) && compadd -U -V unsorted -a plain
    (( $#assignments )) && compadd -U -S '' -V unsorted -a assignments
    return 0
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""


@click.command(short_help="Print what sets up completion in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that lets SHELL complete commands, queries, views, runs and parameters.

    bash: eval "$(moewh completion bash)" in ~/.bashrc. zsh: the same with zsh, after compinit, in ~/.zshrc.
    fish: moewh completion fish > ~/.config/fish/completions/moewh.fish
    """
    register()
    found = shells.get_completion_class(shell)
    assert found is not None  # register added it
    click.echo(found(context.find_root().command, {}, "moewh", COMPLETE_VAR).source().strip())


def register() -> None:
    """Let click answer bash, zsh and fish by the classes below."""
    for known in (Bash, Zsh, Fish):
        shells.add_completion_class(known)


class _Completes(shells.ShellComplete):
    """Completes files where nothing else is known."""

    def get_completions(self, args: list[str], incomplete: str) -> Items:
        """Return what may stand at the cursor."""
        found = super().get_completions(args, incomplete)
        if not found and not incomplete.startswith("-") and "=" not in incomplete:
            return [CompletionItem(incomplete, type="file")]
        return found


class Bash(_Completes, shells.BashComplete):
    """Completes in bash, which takes `run=a:b` for five words and replaces only the last of them."""

    source_template: ClassVar[str] = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the cursor and the one at it, with the parts of each put together again."""
        cursor = int(os.environ["COMP_CWORD"])
        words: list[str] = []
        apart = True
        for part in (shells.split_arg_string(os.environ["COMP_WORDS"]) + [""] * (cursor + 1))[: cursor + 1]:
            breaks = bool(re.fullmatch("[=:]+", part))
            if (apart and not breaks) or not words:
                words.append(part)
            else:
                words[-1] += part
            apart = not breaks
        return words[1:-1], words[-1]

    def complete(self) -> str:
        """Return the completions, without what stands before bash's last break in the word."""
        args, incomplete = self.get_completion_args()
        breaks = "".join(set("=:") & set(os.environ.get("COMP_BREAKS", "=:")))
        start = max((incomplete.rfind(mark) + 1 for mark in breaks), default=0)
        return "\n".join(f"{item.type},{item.value[start:]}" for item in self.get_completions(args, incomplete))


class Zsh(_Completes, shells.ZshComplete):
    """Completes in zsh."""

    source_template: ClassVar[str] = _ZSH


class Fish(_Completes, shells.FishComplete):
    """Completes in fish, which itself sets no space after `=`."""

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return a line that fish reads."""
        if item.type == ASSIGNMENT:
            item.type = "plain"
        return super().format_completion(item)


def _layout(context: click.Context) -> Layout:
    """Return the warehouse that the words so far, or the environment, name; the default for one that cannot be."""
    asked = context.params.get("warehouse")
    return asked if isinstance(asked, Layout) else Layout(Path("wh").absolute())


def _beginning(names: Iterable[str], incomplete: str) -> Items:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_runs(context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """Complete the id of a run."""
    return _beginning(_run_ids(_layout(context)), incomplete)


def _run_ids(layout: Layout) -> list[str]:
    from moewh.warehouse.runs import run_ids

    return run_ids(layout)


def _layers(layout: Layout) -> list[str]:
    """Return the MoE layers of all runs."""
    import duckdb

    files = [str(layout.run(run_id) / "layers.parquet") for run_id in [*_run_ids(layout), SCHEMA_RUN]]
    present = [file for file in files if Path(file).is_file()]
    if not present:
        return []
    with duckdb.connect() as connection:
        sql = "select distinct layer from read_parquet($files, hive_partitioning = false) order by layer"
        return [str(layer) for (layer,) in connection.execute(sql, {"files": present}).fetchall()]


def complete_layers(context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """Complete the number of an MoE layer."""
    return _beginning(_layers(_layout(context)), incomplete)


def complete_queries(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """Complete what `moewh query` answers by name, with what each answers; files where no name fits."""
    from moewh.warehouse.views.base import canned_names

    names = (*canned_names(), *queries.saved_names())
    return [CompletionItem(name, help=_answers(name)) for name in names if name.startswith(incomplete)]


def _answers(name: str) -> str:
    """Return the first line of a view's or saved query's file, which says what it answers."""
    from moewh.warehouse.views.base import QUERIES

    folder = "saved" if name in queries.saved_names() else "views"
    with (QUERIES / folder / f"{name}.sql").open(encoding="utf-8") as file:
        return file.readline().removeprefix("--").strip().removeprefix(f"{name}: ")


def complete_views(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """Complete the name of a view."""
    from moewh.warehouse.views.base import view_names

    return _beginning(view_names(), incomplete)


def complete_folders(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """Complete a folder."""
    return [CompletionItem(incomplete, type="dir")]


def complete_parameters(asked: Callable[[click.Context], Sequence[Query]]) -> Complete:
    """Complete `name=` for the parameters of the queries that the words so far ask for, and then a run or layer."""

    def complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
        from moewh.warehouse.answer.parameters import kinds_of

        try:
            found = asked(context)
        except (MoewhError, OSError):  # what is not there has no parameters
            return []
        name, equals, value = incomplete.partition("=")
        kinds = {known: kind for query in found for known, kind in kinds_of(query).items()}
        if equals:
            values = _values(kinds.get(name, ""), _layout(context))
            return [CompletionItem(f"{name}={one}") for one in values if one.startswith(value)]
        taken = {assignment.partition("=")[0] for assignment in context.params.get("parameters") or ()}
        names = sorted({known for query in found for known in query.variables} - taken)
        return [CompletionItem(f"{known}=", type=ASSIGNMENT) for known in names if known.startswith(incomplete)]

    return complete


def _values(kind: str, layout: Layout) -> list[str]:
    """Return the values that a parameter of a kind can have, as far as folders and small files tell."""
    if kind.startswith("run"):
        return _run_ids(layout)
    return _layers(layout) if kind == "layer" else []


def asked_query(context: click.Context) -> Sequence[Query]:
    """Return the query that the words of `moewh query` name so far. Raises UsageError for an unknown one."""
    sql, names = context.params["sql"], _arguments(context, "name")
    if sql is not None:
        return [Query("-c", sql)]
    if not names:
        raise UsageError("no query is named yet.")
    return [queries.find_query(names[0])]


def asked_checks(context: click.Context) -> Sequence[Query]:
    """Return the checks that the words of `moewh check` name so far. Raises UsageError where there are none."""
    from moewh.warehouse.trust.check import find_checks, shipped_checks

    paths = _arguments(context, "paths")
    return find_checks(tuple(map(Path, paths))) if paths else shipped_checks()


def _arguments(context: click.Context, name: str) -> list[str]:
    """Return a command's arguments so far; click leaves them unparsed where an option still lacks its value."""
    parsed = context.params[name]
    return [*([parsed] if isinstance(parsed, str) else parsed or ()), *context.args]
