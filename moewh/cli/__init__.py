"""The `moewh` command: one file per command.

On Windows, importing it ends the process with one line: an exception would be a traceback.
"""

import sys

from moewh.warehouse.errors import NOT_POSIX

try:
    import fcntl  # noqa: F401 - for warehouse.files.commit, whose locks need POSIX
except ImportError:
    sys.exit(f"moewh: {NOT_POSIX}")
