"""A program `moewh` whose processes are forked from one that has imported everything: a tenth of a second, not seconds.

`forked_moewh` starts `python -m tests.support.forked_program`, which waits at a socket, and writes a small program that
hands it its arguments, environment, folder and standard streams. A forked process has these, runs the command's `main`,
and may replace itself; the program exits as it does. For tests of what a command does, not of how it starts.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

_READING = ("moewh.warehouse.answer.engine", "moewh.warehouse.trust.reports", "moewh.warehouse.views.publishing")
_RUNNING_MODELS = (
    *(
        "moewh.ingest.run",
        "moewh.ingest.geometry.run",
        "moewh.cli.progress",
        "transformers.models.olmoe.modeling_olmoe",
    ),
    *("moewh.warehouse.sealing.merge", "pyarrow.dataset", "pandas"),
)
_PROGRAM = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(asked)
    sys.exit(int(server.recv(8) or b"70"))
"""


@contextmanager
def forked_moewh(folder: Path, *, models: bool, before: Callable[[], None] | None = None) -> Iterator[Path]:
    """Yield the program, in a folder of its own; with `models`, torch is imported beforehand too.

    `before` is called in the process that all others are forked from, before it starts.
    """
    repository = Path(__file__).resolve().parent.parent.parent
    with ExitStack() as stack:
        # in a folder with a short path: that of a socket has at most about a hundred characters
        address = f"{stack.enter_context(TemporaryDirectory())}/s"
        program = folder / "bin" / "moewh"
        program.parent.mkdir(parents=True)
        program.write_text(_PROGRAM.format(python=sys.executable, address=address))
        program.chmod(0o755)
        command = [sys.executable, "-m", "tests.support.forked_program", address, *(["models"] if models else [])]
        server = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=repository, preexec_fn=before)  # noqa: PLW1509
        )
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield program
        server.stdin.close()


def main() -> None:
    """Import, and fork a process for each program, until stdin is closed."""
    if "models" in sys.argv:
        from moewh.ingest.model.light_start import start_light

        start_light(other_code=False)  # as the command does
    for module in ("moewh.cli.main", *_READING, *(_RUNNING_MODELS if "models" in sys.argv else ())):
        import_module(module)
    gc.freeze()  # otherwise each process would copy the memory that its garbage collections visit
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            client, _ = listening.accept()
            if os.fork() == 0:
                _answer(client)
            client.close()
            os.waitpid(-1, os.WNOHANG)  # reaps a process that has finished


def _answer(client: socket.socket) -> NoReturn:
    """Run what a program asks for in one more process, which may replace itself, and send its exit code."""
    length, streams, _, _ = socket.recv_fds(client, 4, 3)
    arguments, folder, environment = json.loads(client.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        _run(arguments, folder, environment, streams)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    client.sendall(b"%d" % (code if code >= 0 else 128 - code))
    os._exit(0)


def _run(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> NoReturn:
    from moewh.cli.main import main as moewh

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, (name, stream) in enumerate(zip(("stdin", "stdout", "stderr"), streams, strict=True)):
        os.dup2(stream, number)
        os.close(stream)
        setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", 1 if number == 2 else -1))
    code: object = 1
    try:
        moewh(arguments, prog_name="moewh")
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    with suppress(OSError):  # its reader has gone
        sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
