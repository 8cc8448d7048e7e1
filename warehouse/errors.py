"""The errors a user can meet: one line each, saying what is wrong and what to do.

The library raises them; only `moewh.cli.failures` turns them into a line on stderr and an exit code.
"""


class MoewhError(Exception):
    """The work could not be done: bad input, an unusable model, a full disk. Exit code 1."""

    exit_code = 1


class UsageError(MoewhError):
    """The command was used wrongly: an option or name that does not exist or does not fit. Exit code 2."""

    exit_code = 2
