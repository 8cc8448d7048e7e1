"""The errors that users see: each is one line that says what is wrong and what to do.

The library raises them; only `moewh.cli.failures` turns them into a line on stderr and an exit code.
"""


class MoewhError(Exception):
    """The work could not be done: bad input, an unusable model, a full disk. Exit code 1."""

    exit_code = 1


class UsageError(MoewhError):
    """The command was used incorrectly: an option or name does not exist or does not fit. Exit code 2."""

    exit_code = 2
