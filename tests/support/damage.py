"""Warehouses with manifests, and every way to damage them, for `tests.warehouse.test_verify` and `tools.soak`."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import read_manifest, write_manifest
from moewh.warehouse.trust import verify
from tests.support import synthetic

OPT_IN = {"router_logits": "logits", "hidden_states": "vector"}


def sound_warehouse(root: Path) -> Layout:
    """Two runs of two segments each, with every table (the opt-in ones too) and right manifests.

    Written once per process, and copied from then on.
    """
    shutil.copytree(_sound_warehouse().name, root, dirs_exist_ok=True, symlinks=True)
    return Layout(root)


@cache
def _sound_warehouse() -> TemporaryDirectory[str]:
    made = TemporaryDirectory()
    layout = Layout(Path(made.name))
    layout.create()
    for seed, run_id in enumerate(("one", "two")):
        run = synthetic.with_outputs(synthetic.random_run(run_id, seed, {0: (8, 2), 1: (8, 2)}), seed)
        run.fields.update(prompts_sha256="0" * 64)
        synthetic.write_run(layout, run)
        identity = synthetic.record_of(run).identity.sha256
        synthetic.write_random_geometry(layout, run, seed)
        write_manifest(layout.geometry(run_id), identity, None)
        for number in range(len(run.segments)):
            folder = layout.segment(run_id, number)
            _add_opt_in(folder, seed)
            write_manifest(folder, identity, number)
    return made


def fresh_copy(source: Layout) -> Layout:
    """Copy a warehouse to a folder beside it, in place of the copy before, to be damaged there."""
    copy = source.root.parent / "copy" / source.root.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(source.root, copy, symlinks=True)
    return Layout(copy)


def _add_opt_in(folder: Path, seed: int) -> None:
    """Give a segment the opt-in tables of vectors, with page checksums."""
    tokens = pq.read_table(folder / schema.TOKENS.file, partitioning=None).column("token_id").to_pylist()
    numbers = np.random.default_rng(seed).random((len(tokens), 4)).astype(np.float32)
    for table in schema.TABLES:
        if table.name in OPT_IN:
            rows = {"token_id": tokens, "layer": [0] * len(tokens), OPT_IN[table.name]: numbers.tolist()}
            arrow = pa.table(rows, schema=table.arrow())
            pq.write_table(arrow, folder / table.file, write_page_checksum=True, compression="zstd")


def committed_files(layout: Layout) -> list[Path]:
    """Every committed file of every run, manifests included, in order; not the empty marks of sealed sets."""
    return [
        path
        for top in ("runs", "segments", "geometry", "sealed")
        for path in sorted((layout.root / top).glob("run_id=[!~]*/**/*"))
        if path.is_file() and path.stat().st_size
    ]


def faults_of(layout: Layout) -> list[verify.Fault]:
    """What verification finds."""
    return verify.check(verify.plan(layout))


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate_half(path: Path, _: random.Random) -> None:
    """Keep the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_byte(path: Path, _: random.Random) -> None:
    """Lose the last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def append_byte(path: Path, _: random.Random) -> None:
    """Gain a byte."""
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path, _: random.Random) -> None:
    """Lose every byte."""
    path.write_bytes(b"")


def zero(path: Path, _: random.Random) -> None:
    """Become zeros of the same length."""
    path.write_bytes(bytes(path.stat().st_size))


def zero_block(path: Path, rng: random.Random) -> None:
    """Lose a sector of the disk, or of a small file some bytes."""
    data = bytearray(path.read_bytes())
    size = min(512, max(1, len(data) // 4))
    start = rng.randrange(len(data) - size + 1)
    data[start : start + size] = bytes(size) if any(data[start : start + size]) else b"\xff" * size
    path.write_bytes(data)


def delete(path: Path, _: random.Random) -> None:
    """Be gone."""
    path.unlink()


def twin(path: Path) -> Path:
    """The same file of the other run."""
    one, two = "/run_id=one/", "/run_id=two/"
    return Path(str(path).replace(one, two) if one in str(path) else str(path).replace(two, one))


def swap(path: Path, _: random.Random) -> None:
    """Change places with the same file of another run."""
    other = twin(path)
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def other_table(path: Path, _: random.Random) -> None:
    """Become a file of another table."""
    other = next(file for file in sorted(path.parent.glob("*.parquet")) if file != path)
    shutil.copyfile(other, path)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    damage.__name__: damage
    for damage in (
        flip,
        truncate_half,
        truncate_byte,
        append_byte,
        empty,
        zero,
        zero_block,
        delete,
        swap,
        other_table,
    )
}


def set_manifest_right(folder: Path) -> None:
    """Make a folder's manifest agree with its files, whatever happened to them."""
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.identity, manifest.segment)
