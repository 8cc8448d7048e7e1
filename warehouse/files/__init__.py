"""Files: what is stored, where, and how it is committed.

Raises MoewhError where there are no POSIX locks, as on Windows.
"""

from moewh.warehouse.errors import NOT_POSIX, MoewhError

try:
    import fcntl  # noqa: F401 - for the locks of commit.py
except ImportError as error:
    raise MoewhError(NOT_POSIX) from error
