"""Shell completion: the words before the cursor in, candidates out. `moewh completion bash` prints the set-up.

click completes commands, options and choices, and `moewh.cli.candidates` what only moewh knows. Everywhere else, the
shell completes files.
"""

from __future__ import annotations

import os
import re
from typing import Any, ClassVar

import click
from click import shell_completion as shells
from click.shell_completion import CompletionItem

from moewh.cli.candidates import ASSIGNMENT, Items
from moewh.cli.options import readable_option
from moewh.warehouse.remote.published import Readable

COMPLETE_VAR = "_MOEWH_COMPLETE"
"""The environment variable with which a shell's script requests completions."""

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


@click.command(short_help="Print a script that sets up shell completion.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
@readable_option
def completion(context: click.Context, shell: str, warehouse: Readable) -> None:  # noqa: ARG001 - words name theirs
    """Print a script that lets SHELL complete commands, queries, views, runs and parameters.

    bash: eval "$(moewh completion bash)" in ~/.bashrc. zsh: the same with zsh, after compinit, in ~/.zshrc.
    fish: moewh completion fish > ~/.config/fish/completions/moewh.fish
    """
    register()
    found = shells.get_completion_class(shell)
    assert found is not None  # register added it
    click.echo(found(context.find_root().command, {}, "moewh", COMPLETE_VAR).source().strip())


def register() -> None:
    """Make click use the classes below for bash, zsh and fish."""
    for known in (Bash, Zsh, Fish):
        shells.add_completion_class(known)


class _Completes(shells.ShellComplete):
    """Completes files where nothing else is known."""

    def get_completions(self, args: list[str], incomplete: str) -> Items:
        """Return the candidates at the cursor."""
        found = super().get_completions(args, incomplete)
        if not found and not incomplete.startswith("-") and "=" not in incomplete:
            return [CompletionItem(incomplete, type="file")]
        return found


class Bash(_Completes, shells.BashComplete):
    """Completes in bash, which splits `run=a:b` into five words and replaces only the last of them."""

    source_template: ClassVar[str] = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the cursor and the one at it, with bash's parts joined again."""
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
        """Return the completions without the text before bash's last break in the word."""
        args, incomplete = self.get_completion_args()
        breaks = "".join(set("=:") & set(os.environ.get("COMP_BREAKS", "=:")))
        start = max((incomplete.rfind(mark) + 1 for mark in breaks), default=0)
        return "\n".join(f"{item.type},{item.value[start:]}" for item in self.get_completions(args, incomplete))


class Zsh(_Completes, shells.ZshComplete):
    """Completes in zsh."""

    source_template: ClassVar[str] = _ZSH


class Fish(_Completes, shells.FishComplete):
    """Completes in fish, which itself adds no space after `=`."""

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return a line in the form that fish reads."""
        if item.type == ASSIGNMENT:
            item.type = "plain"
        return super().format_completion(item)
