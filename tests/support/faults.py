"""A fork server for fault tests: moewh imported once, then a fresh process for every fault in a few milliseconds.

`Server` starts `python -m tests.support.faults`, which forks a child for each request. A child runs the real `moewh`
command, with a `FaultPlan` of what goes wrong in it: killed or failed at the n-th step that touches the disk, on a
small file system of its own, or with one line of our code mutated. Linux only, as `unshare` and `strace` are.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import fcntl
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.models import MAX_LENGTH, save_model

if TYPE_CHECKING:
    from moewh.warehouse.remote.published import Readable

STEPS = ("open", "fsync", "rename", "replace", "mkdir", "unlink")
"""Functions of `os` that change or make durable what is on the disk."""
_LOADED = (
    *("transformers.models.olmoe.modeling_olmoe", "moewh.ingest.run", "moewh.cli.main", "moewh.cli.progress"),
    *("moewh.ingest.model.light_start", "moewh.warehouse.sealing.merge", "moewh.warehouse.sealing.affinity"),
    *("moewh.warehouse.trust.reports", "moewh.warehouse.trust.repair", "moewh.warehouse.answer.engine"),
    *("pyarrow.dataset", "pandas", "zoneinfo", "_strptime", "rich._emoji_codes"),
)
"""What a command imports, or pyarrow and rich while it runs: before the fork, not after each."""
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EACCES")


@dataclass(frozen=True)
class FaultPlan:
    """What goes wrong in a child. Steps are counted from 1, within the warehouse alone."""

    arguments: list[str]
    """Of the moewh command."""
    root: str
    """The warehouse."""
    kill_at: int | None = None
    pause_at: int | None = None
    """The step at which it stops until it gets a SIGCONT."""
    fail_at: int | None = None
    fail_every: str | None = None
    """One of STEPS: all its calls fail."""
    error: str = "EIO"
    file_size: int | None = None
    """Bytes: the limit of a file's size, which the C++ code below Python meets too."""
    mutation: str | None = None
    """A name that `_mutate` knows."""
    record: str | None = None
    """A file that gets a line for every step."""
    stopped_clock: bool = False
    read: bool = False
    """Whether someone reads the warehouse meanwhile; if not, sealing waits for no readers."""


@dataclass
class Server:
    """The parent of all children; a context manager."""

    published: Path | None = None
    """What the children put in place as `warehouse.duckdb`; None: each makes it, which is half of a small ingest."""
    process: subprocess.Popen[str] = field(init=False)

    def __enter__(self) -> Server:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faults", *([str(self.published)] if self.published else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).resolve().parent.parent.parent,
        )
        assert self._read() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def start(self, what: str, **arguments: Any) -> int:
        """Fork a child that does `what` (a function of CHILDREN); return its process id."""
        return int(self._ask(do=what, arguments=arguments)["pid"])

    def wait(self, pid: int) -> dict[str, Any]:
        """Wait for a child; return its exit code (negative: the signal), what it printed and what it returned."""
        return self._ask(do="wait", arguments={"pid": pid})

    def run(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Start a child and wait for it."""
        return self.wait(self.start(what, **arguments))

    def moewh(self, plan: FaultPlan) -> dict[str, Any]:
        """Run a moewh command with its faults."""
        return self.run("moewh", **asdict(plan))

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read())
        return answer

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the fork server died")
        return line.strip()


# ------------------------------------------------------------------------------------------ in the server


def main() -> None:
    """Import what a command needs, then fork a child for every line on stdin."""
    import torch

    for module in _LOADED:
        import_module(module)
    torch.set_num_threads(1)
    from moewh.ingest.write.rollups import one_blas_thread

    with one_blas_thread():
        pass  # finds the libraries that it limits, once for all children
    gc.freeze()  # or each child would copy what its own collections walk through
    print("ready", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="moewh-faults-"))
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "wait":
            answer = _reap(folder, request["arguments"]["pid"])
        else:
            answer = {"pid": _fork(folder, CHILDREN[request["do"]], request["arguments"])}
        print(json.dumps(answer), flush=True)
    shutil.rmtree(folder)
    gc.unfreeze()  # DuckDB reports what is not freed in the end


def _fork(folder: Path, work: Callable[..., Any], arguments: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    place = folder / str(os.getpid())
    place.mkdir()
    code = 70
    try:
        with (place / "stderr").open("w", buffering=1) as stream, contextlib.redirect_stderr(stream):
            os.dup2(stream.fileno(), 2)
            os.dup2(stream.fileno(), 1)
            code, result = work(**arguments)
        (place / "result").write_text(json.dumps(result))
    except BaseException as error:
        (place / "stderr").write_text(f"child failed: {error!r}")
    finally:
        os._exit(code)


def _reap(folder: Path, pid: int) -> dict[str, Any]:
    _, status = os.waitpid(pid, 0)
    place = folder / str(pid)
    texts = {name: (place / name).read_text() if (place / name).is_file() else "" for name in ("stderr", "result")}
    shutil.rmtree(place, ignore_errors=True)
    result = json.loads(texts["result"]) if texts["result"] else None
    return {"code": os.waitstatus_to_exitcode(status), "stderr": texts["stderr"], "result": result}


# ------------------------------------------------------------------------------------------ in a child


def run_moewh(**plan: Any) -> tuple[int, Any]:
    """Run one command; return its exit code and the number of steps it took."""
    chosen = FaultPlan(**plan)
    steps = _count_steps(chosen)
    _mutate(chosen.mutation)
    if not chosen.read:
        _wait_for_no_reader()
    if chosen.file_size is None:
        _publish_a_copy()
    else:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (chosen.file_size, chosen.file_size))
    if chosen.stopped_clock:
        time.monotonic = time.time = time.perf_counter = lambda: 1_000.0
    code = _command(chosen.arguments)
    return code, steps[0]


def _publish_a_copy() -> None:
    """Make no views where the server was given a file that has some: none of that touches the warehouse."""
    from moewh.warehouse.views import publishing

    def copy(warehouse: Readable, file: Path) -> None:  # noqa: ARG001 - as the one that it stands for
        shutil.copyfile(sys.argv[1], file)

    if len(sys.argv) > 1:
        publishing.build = copy


def _wait_for_no_reader() -> None:
    from moewh.warehouse.sealing import seal

    seal.PAUSE = 0


def run_on_small_disk(
    arguments: list[str], root: str, first: str, then: str, mutation: str | None = None
) -> tuple[int, Any]:
    """Run a command on a tmpfs of its own with mount options `first`; then mount it anew with `then` and run again.

    Returns both exit codes and what was said, the committed files after each, and the faults verify finds.
    """
    from tests.support.runs import contents

    _mutate(mutation)
    _wait_for_no_reader()
    _own_mounts()
    parent = Path(root).parent
    _mount(parent, first)
    said, codes, committed = [], [], []
    for options in (None, then):
        if options is not None:
            _mount(parent, f"remount,{options}")
        output = io.StringIO()
        with contextlib.redirect_stderr(output):
            codes.append(_command(arguments))
        said.append(output.getvalue())
        committed.append(contents(Path(root)))
    return 0, {"codes": codes, "said": said, "committed": committed, "faults": _faults(root)}


def run_read_only(commands: list[list[str]], root: str, copy_of: str, mutation: str | None = None) -> tuple[int, Any]:
    """Run commands on a copy of a warehouse that is mounted read-only; return each one's exit code and words."""
    _mutate(mutation)
    _own_mounts()
    parent = Path(root).parent
    _mount(parent, "size=64m")
    shutil.copytree(copy_of, root, symlinks=True)
    _mount(parent, "remount,ro")
    done = []
    for arguments in commands:
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            done.append([_command(arguments), output.getvalue()])
    return 0, done


def _command(arguments: list[str]) -> int:
    from moewh.cli.main import main as moewh

    try:
        moewh(arguments, prog_name="moewh")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _faults(root: str) -> list[str]:
    from moewh.warehouse.files.layout import Layout
    from moewh.warehouse.trust import verify

    return [f"{fault.path}: {fault.why}" for fault in verify.check(verify.plan(Layout(Path(root))), 1)]


def _own_mounts() -> None:
    """Leave the parent's mounts: what is mounted from now on nobody else sees, and it ends with this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, mounts = 0x1000_0000, 0x0002_0000
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(mounts | (0 if uid == 0 else user)):
        raise OSError(ctypes.get_errno(), "unshare")
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def _mount(folder: Path, options: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def _count_steps(plan: FaultPlan) -> list[int]:
    """Count every step within the warehouse; do harm at the one that the plan names. Returns the count, live."""
    count = [0]
    root = str(plan.root)
    descriptors: dict[int, str] = {}
    log = Path(plan.record).open("a", buffering=1) if plan.record else None  # noqa: SIM115 - open to the end

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(target: Any, *rest: Any, **named: Any) -> Any:
            path = descriptors.get(target, "") if isinstance(target, int) else os.fspath(target)
            if not str(path).startswith(root):
                return real(target, *rest, **named)
            count[0] += 1
            if log is not None:
                log.write(
                    json.dumps([name, path, *(str(part) for part in rest if isinstance(part, str | Path))]) + "\n"
                )
            if count[0] == plan.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if count[0] == plan.pause_at:
                os.kill(os.getpid(), signal.SIGSTOP)
            if count[0] == plan.fail_at or name == plan.fail_every:
                number = getattr(errno, plan.error)
                raise OSError(number, os.strerror(number), str(path))
            result = real(target, *rest, **named)
            if name == "open":
                descriptors[result] = str(path)
            return result

        return step

    for name in STEPS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    _count_parquet(wrapped)
    return count


def _count_parquet(wrapped: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Count the beginning of every Parquet file too, which is opened below Python."""
    import pyarrow.parquet as pq

    real = pq.ParquetWriter.__init__
    begin = wrapped("parquet", lambda where, writer, rest, named: real(writer, where, *rest, **named))
    pq.ParquetWriter.__init__ = lambda writer, where, *rest, **named: (
        begin(where, writer, rest, named) if isinstance(where, str | Path) else real(writer, where, *rest, **named)
    )


def _mutate(name: str | None) -> None:
    """Break one promise of our own code, to see that a test notices."""
    if name is not None:
        for module, what, change in _mutations()[name]:
            holder = import_module(module) if isinstance(module, str) else module
            assert hasattr(holder, what) or hasattr(builtins, what), f"{holder} has no {what} to mutate"
            setattr(holder, what, change)


def _mutations() -> dict[str, list[tuple[Any, str, Any]]]:
    """By name: which attribute of which module or class becomes what."""
    from moewh.warehouse.files.commit import commit, make_folder, sync
    from moewh.warehouse.files.layout import Layout
    from moewh.warehouse.files.manifest import MANIFEST

    writers = ("moewh.warehouse.files.layout", "moewh.ingest.write.run_files")

    def rename_first(folder: Path, target: Path) -> bool:
        make_folder(target.parent)
        folder.rename(target)
        for file in target.iterdir():
            sync(file)
        return True

    def one_by_one(pause: float) -> Callable[[Path, Path], bool]:
        def commit(folder: Path, target: Path) -> bool:
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.iterdir()):
                file.rename(target / file.name)
                time.sleep(pause)
            return True

        return commit

    def without_manifest(folder: Path, target: Path) -> bool:
        (folder / MANIFEST).unlink(missing_ok=True)
        return commit(folder, target)

    def race_is_an_error(folder: Path, target: Path) -> bool:
        if not commit(folder, target):
            raise FileExistsError(errno.EEXIST, "another process was first", str(target))
        return True

    def sync_if_possible(path: Path) -> None:
        with contextlib.suppress(OSError):
            sync(path)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    @contextlib.contextmanager
    def deaf(_: object) -> Iterator[Callable[[], None]]:
        yield lambda: None

    return {
        "no fsync": [("moewh.warehouse.files.commit", "sync", lambda _: None)],
        "no fsync of folders": [
            ("moewh.warehouse.files.commit", "sync", lambda path: None if path.is_dir() else sync(path))
        ],
        "errors of fsync ignored": [
            (module, "sync", sync_if_possible)
            for module in (
                "moewh.warehouse.files.commit",
                "moewh.warehouse.files.layout",
                "moewh.warehouse.views.publishing",
            )
        ],
        "rename first": [(module, "commit", rename_first) for module in writers],
        "no staging": [(module, "commit", one_by_one(0)) for module in writers],
        "no staging, slowly": [(module, "commit", one_by_one(0.02)) for module in writers],  # a reader sees it
        "a lost race is an error": [(module, "commit", race_is_an_error) for module in writers],
        "no manifest": [(module, "commit", without_manifest) for module in writers],
        "errors not explained": [(Layout, "writing", lambda _: contextlib.nullcontext())],
        "deaf to signals": [(module, "stoppable", deaf) for module in ("moewh.cli.main", "moewh.cli.ingest")],
        "spill into the warehouse": [(os, "access", lambda *_: True)],
        "no locks": [(fcntl, "flock", no_locks)],  # a file system's, not ours
        "the clock is trusted": [
            (module, "max", lambda seconds, _: seconds) for module in ("moewh.cli.progress", "moewh.cli.ingest")
        ],
    }


CHILDREN: dict[str, Callable[..., tuple[int, Any]]] = {
    "moewh": run_moewh,
    "small disk": run_on_small_disk,
    "read-only": run_read_only,
}


# ------------------------------------------------------------------------------------------ a run to disturb


@dataclass(frozen=True)
class Job:
    """A tiny model and a few prompts: three segments, and a kill or a signal can fall between any two."""

    folder: Path

    @staticmethod
    def make(folder: Path) -> Job:
        """Write the model and the prompts."""
        save_model(folder / "tiny", num_hidden_layers=2)
        rows = [{"text": f"prompt {n} " + "word " * (n % 5), "domain": "ab"[n % 2]} for n in range(24)]
        (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Job(folder)

    def arguments(self, root: Path, *more: str) -> list[str]:
        """The ingest command that writes them to a warehouse."""
        files = ["--model", str(self.folder / "tiny"), "--prompts", str(self.folder / "p.jsonl")]
        sizes = ["--segment-rows", "400", "--max-length", str(MAX_LENGTH), "--device", "cpu"]
        return ["ingest", *files, *sizes, "--warehouse", str(root), *more]

    def plan(self, root: Path, *more: str, **faults: Any) -> FaultPlan:
        """The same with faults."""
        return FaultPlan(self.arguments(root, *more), str(root), **faults)


def segments_of(root: Path) -> set[Path]:
    """The committed segments, relative to the warehouse."""
    return {path.relative_to(root) for path in root.glob("segments/run_id=[!~]*/segment=*")}


if __name__ == "__main__":
    main()
