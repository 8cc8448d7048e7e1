"""`moewh verify` finds any damage, reports it, moves it out, and shows the command that restores it."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from moewh.cli.main import main
from moewh.ingest.options import IngestOptions, command_words
from moewh.ingest.run import ingest
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files import manifest, pages, schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import MANIFEST, ManifestError, parse_manifest, read_manifest, write_manifest
from moewh.warehouse.files.names import SCHEMA_RUN
from moewh.warehouse.trust import verify
from moewh.warehouse.views.opening import open_warehouse
from tests.support.damage import (
    DAMAGES,
    committed_files,
    empty,
    faults_of,
    flip,
    fresh_copy,
    set_manifest_right,
    sound_warehouse,
    swap,
    truncate_half,
    twin,
    zero,
)
from tests.support.models import save_model
from tests.support.runs import contents

FLIPS = 40


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return sound_warehouse(tmp_path_factory.mktemp("sound") / "wh")


@pytest.fixture
def layout(sound: Layout) -> Layout:
    return fresh_copy(sound)


@pytest.fixture
def damaged(sound: Layout) -> Iterator[Callable[[Iterable[Path], str, random.Random], list[verify.Fault]]]:
    """Damages files of the shared warehouse, verifies it, and restores every file."""
    before = {path: path.read_bytes() for path in committed_files(sound)}

    def damage(paths: Iterable[Path], kind: str, rng: random.Random) -> list[verify.Fault]:
        for path in paths:
            DAMAGES[kind](path, rng)
        try:
            return faults_of(sound)
        finally:
            for file in {file for path in paths for file in (path, twin(path))}:
                file.write_bytes(before[file])

    yield damage
    assert faults_of(sound) == []


def moewh(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"MOEWH_WAREHOUSE": str(layout.root)})


# ------------------------------------------------------------------------------------------ what it finds


def test_sound_warehouse_has_no_faults(sound: Layout) -> None:
    result = moewh(sound, "verify")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "2 runs, 4 segments" in result.stdout
    assert "all as committed" in result.stdout
    tables = {path.name for path in committed_files(sound)} - {MANIFEST}
    assert tables == {table.file for table in schema.TABLES}, "every table must be there to be damaged"


def one_of_each(layout: Layout, turn: int) -> list[Path]:
    """Return every file of one run, but for each table only one of its two segments' files, alternating."""
    files = [path for path in committed_files(layout) if "run_id=one" in str(path)]
    segments = [[path for path in files if path.parent == layout.segment("one", number)] for number in (0, 1)]
    chosen = [pair[(turn + number) % 2] for number, pair in enumerate(zip(*segments, strict=True))]
    return [path for path in files if path in chosen or path not in (*segments[0], *segments[1])]


def one_of_each_folder(files: Iterable[Path]) -> Iterator[list[Path]]:
    """Yield the files such that each is in one list, and no list has two of a folder."""
    folders = groupby(files, key=lambda path: path.parent)
    for row in zip_longest(*(list(of_folder) for _, of_folder in folders)):
        yield [path for path in row if path is not None]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_in_every_table_is_found(kind: str, sound: Layout, damaged: Any) -> None:
    """One file of each folder at a time: a fault names its folder."""
    rng = random.Random(kind)
    chosen = [
        path
        for path in one_of_each(sound, list(DAMAGES).index(kind))
        if kind != "swap" or path.read_bytes() != twin(path).read_bytes()
    ]
    for paths in one_of_each_folder(chosen):
        assert len({path.parent for path in paths}) == len(paths)
        faults = damaged(paths, kind, rng)
        for path in paths:
            assert path in {fault.path for fault in faults} or path.parent in {f.folder for f in faults}, path


def test_flipped_bits_are_found(sound: Layout, damaged: Any) -> None:
    rng = random.Random(0)
    files = committed_files(sound)
    found = sum(bool(damaged([rng.choice(files)], "flip", rng)) for _ in range(FLIPS))
    assert found == FLIPS


def test_zero_row_files_are_verified_too(layout: Layout) -> None:
    for folder in (layout.run(SCHEMA_RUN), layout.segment(SCHEMA_RUN, 0), Layout(layout.empty).run(SCHEMA_RUN)):
        path = sorted(folder.glob("*.parquet"))[0]
        flip(path, random.Random(1))
        assert path in {fault.path for fault in faults_of(layout)}
    assert moewh(layout, "verify", "--repair").exit_code == 1
    assert moewh(layout, "verify").exit_code == 0
    assert moewh(layout, "query", "expert_load").exit_code == 0


PLACES: list[tuple[str, Callable[[Layout], object], str]] = [
    ("no manifest", lambda wh: (wh.segment("one", 0) / MANIFEST).unlink(), "manifest.json: is missing"),
    ("foreign file", lambda wh: (wh.segment("one", 0) / "x.bin").touch(), "x.bin: is not a file of this folder"),
    ("folder in it", lambda wh: (wh.segment("one", 0) / "x").mkdir(), "segment=0/x: is not a file of this folder"),
    ("segments swapped", lambda wh: swap_folders(wh.segment("one", 0), wh.segment("one", 1)), "to another folder"),
    ("runs' segments swapped", lambda wh: swap_folders(wh.segment("one", 0), wh.segment("two", 0)), "to another"),
    ("run folders swapped", lambda wh: swap_folders(wh.run("one"), wh.run("two")), "belongs to another folder"),
    ("renumbered", lambda wh: wh.segment("one", 1).rename(wh.segment("one", 7)), "belongs to another folder"),
    ("no number", lambda wh: wh.segment("one", 1).rename(wh.segments("one") / "segment=01"), "not the folder of a seg"),
    ("no run id", lambda wh: wh.run("one").rename(wh.run("_one")), "is not the folder of a run"),
    ("run lost", lambda wh: shutil.rmtree(wh.run("one")), "run_id=one/run.parquet: is missing"),
    ("a file beside", lambda wh: (wh.root / "segments" / "note.txt").touch(), "note.txt: is not the folder of a run"),
    ("manifest is a folder", lambda wh: folder_for(wh.segment("one", 0) / MANIFEST), "manifest.json: is not a file"),
]


def swap_folders(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(("change", "says"), [place[1:] for place in PLACES], ids=[place[0] for place in PLACES])
def test_what_is_out_of_place_is_found(change: Callable[[Layout], object], says: str, layout: Layout) -> None:
    change(layout)
    result = moewh(layout, "verify")
    assert result.exit_code == 1
    assert says in result.stdout


def rewrite(path: Path, sql: str) -> None:
    """Replace a file with the result of SQL over it, and make its manifest agree."""
    new = path.with_name("new")
    rows = f"read_parquet('{path}', hive_partitioning = false)"
    duckdb.execute(f"copy ({sql.format(file=rows)}) to '{new}' (format parquet)")
    new.replace(path)
    set_manifest_right(path.parent)


REWRITTEN = [
    ("routing", "select * from {file} limit 10", "routing_rows, but segment.parquet says"),
    ("tokens", "select * from {file} limit 1", "tokens, but segment.parquet says"),
    ("prompts", "select * exclude (source) from {file}", "has the columns prompt_id, domain, text"),
    ("expert_counts", "select * replace (tokens + 1 as tokens) from {file}", "expert_counts.parquet: has"),
    ("affinity_counts", "select * from {file} limit 3", "affinity_counts.parquet: has"),
    ("vocab_counts", "select * replace (tokens * 2 as tokens) from {file}", "first choices"),
    ("segments", "select * replace (not last as last) from {file}", "is wrong about being the last"),
]


@pytest.mark.parametrize(("table", "sql", "says"), REWRITTEN, ids=[row[0] for row in REWRITTEN])
def test_files_that_agree_with_the_manifest_but_not_with_each_other(
    table: str, sql: str, says: str, layout: Layout
) -> None:
    file = next(stored.file for stored in schema.TABLES if stored.name == table)
    rewrite(layout.segment("one", 0) / file, sql)
    result = moewh(layout, "verify")
    assert (result.exit_code, says in result.stdout) == (1, True), result.stdout


def test_rollups_are_counted_again_when_asked(layout: Layout) -> None:
    sql = "select * replace (tokens + 1 as tokens) from {file}"
    rewrite(layout.segment("two", 1) / schema.PAIR_COUNTS.file, sql)
    assert moewh(layout, "verify").exit_code == 0
    result = moewh(layout, "verify", "--rollups")
    assert (result.exit_code, "pair_counts.parquet: " in result.stdout) == (1, True), result.output


def test_options_of_a_run_give_its_identity(layout: Layout) -> None:
    rewrite(layout.run("one") / schema.RUNS.file, "select * replace ('{{}}' as options) from {file}")
    assert "do not match its identity" in moewh(layout, "verify").stdout


def test_several_threads_find_what_one_finds(layout: Layout) -> None:
    flip(layout.segment("one", 0) / schema.ROUTING.file, random.Random(0))
    empty(layout.run("two") / schema.LAYERS.file, random.Random(0))
    faults = verify.check(verify.plan(layout), 1)
    assert verify.check(verify.plan(layout), 4) == faults
    assert len(faults) == 2


# ------------------------------------------------------------------------------------------ page checksums


def end(column: Any) -> int:
    """Return the offset at which the last page of a column ends."""
    first = column.dictionary_page_offset or column.data_page_offset
    return int(first + column.total_compressed_size)


def test_page_checksums_find_what_arrow_finds(tmp_path: Path) -> None:
    """A bit flipped in a page before the sha256 is taken: only the page's own checksum knows."""
    layout = sound_warehouse(tmp_path / "wh")
    path = layout.segment("one", 0) / schema.HIDDEN_STATES.file
    metadata = pq.read_metadata(path)
    column = metadata.row_group(0).column(2)
    original, rng = path.read_bytes(), random.Random(3)
    for _ in range(40):
        data = bytearray(original)
        place = end(column) - 1 - rng.randrange(100)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(OSError, match=r"CRC|checksum"), pq.ParquetFile(path, page_checksum_verification=True) as f:
            f.read()
        with pytest.raises(MoewhError, match="does not match its checksum") as refused:
            set_manifest_right(path.parent)
        assert f"{path.name}: row group 0, column vector.list.element: page" in str(refused.value)


def test_every_page_has_a_checksum_that_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    real = zlib.crc32

    def crc32(data: memoryview) -> int:
        looked_at.append(len(data))
        return real(data)

    monkeypatch.setattr(zlib, "crc32", crc32)
    options = IngestOptions(model="demo", prompts=("demo",), limit=5, dtype="float32")
    summary = ingest(options, Layout(tmp_path / "wh"))
    folder = Layout(tmp_path / "wh").segment(summary.run_id, 0)
    for path in folder.glob("*.parquet"):
        looked_at.clear()
        metadata = pq.read_metadata(path)
        pages.check_pages(path, metadata)
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        columns = [group.column(place) for group in groups for place in range(group.num_columns)]
        assert len(looked_at) >= len(columns) > 0


@pytest.mark.parametrize("length", [1, 5, 40, 400])
def test_headers_that_make_no_sense_are_page_errors(length: int) -> None:
    rng = random.Random(0)
    for _ in range(300):
        with pytest.raises(pages.PageError):
            pages.check_chunk(rng.randbytes(length))


# ------------------------------------------------------------------------------------------ mutations of our own code


def test_a_verify_that_ignores_sha256_misses_flips(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    path = layout.segment("one", 0) / schema.PROMPTS.file
    data = path.read_bytes()
    entry = read_manifest(path.parent).files[path.name]
    missed = 0
    folder = next(found for found in verify.plan(layout).folders if found.path == path.parent)
    monkeypatch.setattr(verify, "file_sha256", lambda _: entry.sha256)
    rng = random.Random(0)
    for _ in range(40):
        flip(path, rng)
        missed += verify._file_fault((folder, path.name, entry)) is None
        path.write_bytes(data)
    assert missed > 0


def test_a_commit_that_ignores_page_checksums_hashes_what_was_damaged(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = layout.segment("one", 0) / schema.HIDDEN_STATES.file
    column = pq.read_metadata(path).row_group(0).column(2)
    data = bytearray(path.read_bytes())
    data[end(column) - 5] ^= 4
    path.write_bytes(data)
    with pytest.raises(MoewhError):
        set_manifest_right(path.parent)
    assert len(faults_of(layout)) == 1  # its sha256 is still that of the right file
    monkeypatch.setattr(manifest, "check_pages", lambda *_: None)
    set_manifest_right(path.parent)
    assert faults_of(layout) == []


# ------------------------------------------------------------------------------------------ manifests


def test_manifest_is_read_as_it_was_written(layout: Layout) -> None:
    folder = layout.segment("one", 0)
    before = (folder / MANIFEST).read_bytes()
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.identity, manifest.segment)
    assert (folder / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}",
        b'{"format": 2, "schema": 1, "identity": null, "segment": null, "files": {}}',
        b'{"format": 1, "schema": 1, "identity": 7, "segment": null, "files": {}}',
        b'{"format": 1, "schema": 1, "identity": null, "segment": -1, "files": {}}',
        b'{"format": 1, "schema": 1, "identity": null, "segment": null, "files": []}',
        b'{"format": 1, "schema": 1, "identity": null, "segment": null, "files": {}, "more": 1}',
        b'{"format": 1, "schema": 1, "identity": null, "segment": null, "files": {"../../x.parquet": {}}}',
        b'{"format": 1, "schema": 1, "identity": null, "segment": null, "files": {"tokens.parquet": {"rows": 1}}}',
        b'{"format": 1, "schema": 1, "identity": null, "segment": 1e999, "files": {}}',
        b'{"format": 1, "schema": 1, "identity": null, "segment": ' + b"9" * 5_000 + b', "files": {}}',
        b'{\n "format": true,\n "schema": 1,\n "identity": null,\n "segment": null,\n "files": {}\n}\n',
    ],
    ids=range(17),
)
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(text)


# ------------------------------------------------------------------------------------------ repair and output


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_reader_that_stops_early_does_not_change_the_exit_code(form: str, layout: Layout) -> None:
    def code() -> int:
        reader, writer = os.pipe()
        os.close(reader)
        command = ["verify", "--format", form, "--warehouse", str(layout.root)]
        done = subprocess.run(
            [sys.executable, "-m", "moewh", *command], stdout=writer, stderr=subprocess.DEVNULL, check=False
        )
        os.close(writer)
        return done.returncode

    assert code() == 0
    (layout.segment("one", 0) / MANIFEST).unlink()
    assert code() == 1


def test_json_output(layout: Layout) -> None:
    flip(layout.segment("one", 1) / schema.ROUTING.file, random.Random(0))
    result = moewh(layout, "verify", "--format", "json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["runs"], report["segments"]) == (2, 4)
    assert report["bytes"] == sum(
        path.stat().st_size for path in layout.root.rglob("*.parquet") if "unsealed" not in path.parts
    )
    (fault,) = report["faults"]
    assert fault["path"] == "segments/run_id=one/segment=1/routing.parquet"
    assert fault["why"] == "does not match its sha256"
    assert fault["quarantined"] is None
    assert "--run-id one" in fault["restore"]


def test_repair_moves_only_what_is_bad(layout: Layout) -> None:
    flip(layout.segment("one", 1) / schema.TOKENS.file, random.Random(0))
    for _ in range(2):  # the second time the same place in quarantine/ is taken
        result = moewh(layout, "verify", "--repair")
        assert result.exit_code == 1
        assert "tokens.parquet: does not match its sha256" in result.stdout
        assert moewh(layout, "verify").exit_code == 0
        assert not layout.segment("one", 1).exists()
        assert moewh(layout, "query", "routes").exit_code == 0
        shutil.copytree(layout.root / "quarantine/segments/run_id=one/segment=1", layout.segment("one", 1))
    names = [path.name for path in (layout.root / "quarantine/segments/run_id=one").iterdir()]
    assert sorted(names) == ["segment=1", "segment=1.2"]


FOLDERS = ["runs/run_id=one", "segments/run_id=one/segment=0", "sealed/run_id=one", "geometry/run_id=one"]


@pytest.fixture(scope="module")
def sound_and_sealed(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """The warehouse with one run sealed, as `FOLDERS` has it."""
    layout = sound_warehouse(tmp_path_factory.mktemp("sealed") / "wh")
    assert moewh(layout, "seal", "one").exit_code == 0
    return layout


@pytest.fixture
def sealed(sound_and_sealed: Layout) -> Layout:
    return fresh_copy(sound_and_sealed)


@pytest.mark.parametrize("target", ["nowhere", "stray.parquet"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_stray_broken_link_is_moved(folder: str, target: str, sealed: Layout) -> None:
    stray = sealed.root / folder / "stray.parquet"
    for number in ("", ".2"):  # the second time the same place in quarantine/ is taken
        stray.symlink_to(target)
        result = moewh(sealed, "verify", "--repair")
        assert f"moved to quarantine/{folder}/stray.parquet{number}\n" in result.stdout
        assert not stray.is_symlink()
        assert moewh(sealed, "verify").exit_code == 0


@pytest.mark.parametrize("link", ["segments/run_id=one", "segments/run_id=one/segment=0", "sealed/run_id=zz"])
def test_a_link_to_a_lost_disk_is_no_work_for_repair(link: str, layout: Layout) -> None:
    """Its disk may come back: nothing is moved, and no command is named that would write the rows again."""
    path = layout.root / link
    if path.exists():
        shutil.rmtree(path)
    path.symlink_to("nowhere")
    said = moewh(layout, "verify").stdout
    assert f"{link}: is a link to {path.parent.resolve()}/nowhere, which is not a folder: mount that disk, or" in said
    assert "--repair" not in said
    assert "writes it again" not in said
    (layout.segment("two", 0) / "tokens.parquet").write_bytes(b"damaged")
    result = moewh(layout, "verify", "--repair")
    assert (result.exit_code, "Mount that disk, or remove the link." in result.stderr) == (1, True)
    assert not (layout.root / "quarantine").exists()


@pytest.mark.parametrize("name", ["notes.txt", "folder/file", "layers (1).parquet", "vocabulary2.parquet"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_stray_in_a_sound_folder_is_moved_alone(folder: str, name: str, sealed: Layout) -> None:
    path = sealed.root / folder / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    stray = f"{folder}/{Path(name).parts[0]}"
    found = moewh(sealed, "verify").stdout
    command = f"moewh verify --repair --warehouse {sealed.root}"
    assert f"{stray}: is not a file of this folder\n`{command}` moves what is bad to quarantine/.\n" in found
    assert moewh(sealed, "verify", "--repair").exit_code == 1
    assert (sealed.root / "quarantine" / stray).exists()
    result = moewh(sealed, "verify")
    assert result.exit_code == 0, result.stdout
    assert sealed.sealed("one").is_dir()
    assert sealed.segment("one", 0).is_dir()


@pytest.mark.parametrize("before", ["open", "flock"])
def test_a_sweep_between_the_making_of_a_folder_and_its_lock_does_no_harm(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may sweep at any moment, and take a folder without a lock for a dead process's."""
    layout = Layout(tmp_path / "wh")
    layout.create()
    module = os if before == "open" else fcntl
    real = getattr(module, before)
    swept: list[Path] = []

    def after_a_sweep(*arguments: Any, **named: Any) -> Any:
        if not swept and (live := [*layout.staging.glob("live.*")]):
            swept.extend(live)
            layout.sweep()
        return real(*arguments, **named)

    monkeypatch.setattr(module, before, after_a_sweep)
    with layout.staged("live") as folder:
        assert folder.is_dir()
        assert len(swept) == 1
        assert folder not in swept
    assert list(layout.staging.glob("live.*")) == []


def test_stale_staging_is_swept_and_live_is_not(layout: Layout) -> None:
    (layout.staging / "dead.0123.part").mkdir()
    with layout.staged("live") as live:
        assert moewh(layout, "verify").exit_code == 0
        assert live.is_dir()
    assert sorted(path.name for path in layout.staging.iterdir()) == ["empty"]


def test_verify_imports_no_torch(layout: Layout) -> None:
    import subprocess
    import sys

    code = "import sys; from moewh.cli.main import main; main(standalone_mode=False)"
    check = "assert not {'torch', 'transformers'} & set(sys.modules)"
    arguments = ["verify", "--warehouse", str(layout.root)]
    subprocess.run([sys.executable, "-c", f"{code}; {check}", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts and a warehouse of several segments."""
    folder = tmp_path_factory.mktemp("ingested")
    save_model(folder / "tiny")
    rows = [{"text": f"prompt {n} " + "word " * (n % 7)} for n in range(20)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["ingest", "--model", str(folder / "tiny"), "--prompts", str(folder / "p.jsonl"), "--limit", "18"]
    arguments += ["--segment-rows", "600", "--max-length", "40", "--no-special-tokens", "--run-id", "a-run"]
    assert CliRunner().invoke(main, [*arguments, "--warehouse", str(folder / "wh")]).exit_code == 0
    return folder


@pytest.mark.parametrize(
    "bad", [["segment=0/routing.parquet"], ["segment=1/prompts.parquet", "segment=2/manifest.json"], ["layers.parquet"]]
)
def test_the_command_that_repair_names_restores_every_byte(bad: list[str], ingested: Path, tmp_path: Path) -> None:
    shutil.copytree(ingested / "wh", tmp_path / "wh", symlinks=True)
    layout = Layout(tmp_path / "wh")
    before = contents(layout.root)
    for name in bad:
        place = layout.segments("a-run") if name.startswith("segment=") else layout.run("a-run")
        flip(place / name, random.Random(0))
    assert moewh(layout, "verify", "--repair").exit_code == 1
    assert moewh(layout, "verify", "--repair").exit_code == (1 if "layers.parquet" in bad else 0)
    command = restore_line(layout)
    assert CliRunner().invoke(main, command).exit_code == 0
    assert contents(layout.root) == before
    assert moewh(layout, "verify").exit_code == 0
    (status,) = open_warehouse(layout).execute("select status from runs").fetchall()
    assert status == ("complete",)


@pytest.mark.parametrize("number", [0, -1])
def test_a_segment_that_is_lost_from_a_sealed_run_has_its_command(number: int, ingested: Path, tmp_path: Path) -> None:
    """Its counts cannot be merged again before it is there, so `moewh seal` would be no advice."""
    shutil.copytree(ingested / "wh", tmp_path / "wh", symlinks=True)
    layout = Layout(tmp_path / "wh")
    before = contents(layout.root)
    shutil.rmtree(sorted(layout.segments("a-run").glob("segment=*"))[number])
    report = moewh(layout, "verify", "--repair").output
    assert "moewh ingest --model" in report
    assert "moewh seal" not in report
    assert CliRunner().invoke(main, restore_line(layout)).exit_code == 0
    assert contents(layout.root) == before


def restore_line(layout: Layout) -> list[str]:
    """Return the command that verify prints, with its prompts filled in."""
    from moewh.warehouse.trust.repair import restore_command

    line, _, _ = restore_command(layout, "a-run", command_words).partition(" --prompts FILE")
    prompts = layout.root.parent / "p.jsonl"
    rows = [{"text": f"prompt {n} " + "word " * (n % 7)} for n in range(20)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*shlex.split(line)[1:], "--prompts", str(prompts)]


def test_a_run_that_lost_its_files_takes_no_segments_of_another(ingested: Path, tmp_path: Path) -> None:
    shutil.copytree(ingested / "wh", tmp_path / "wh", symlinks=True)
    layout = Layout(tmp_path / "wh")
    arguments = [*restore_line(layout), "--max-length", "20"]
    shutil.rmtree(layout.run("a-run"))
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, "has lost its own files, and its segments belong to another run" in result.stderr) == (
        1,
        True,
    )


# ------------------------------------------------------------------------------------------ queries over damage

LOUD = [truncate_half, empty, zero]


@pytest.mark.parametrize("damage", LOUD, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("table", [table.name for table in schema.TABLES if table.level == "segment"])
def test_query_over_a_broken_file_names_it(damage: Any, table: str, layout: Layout) -> None:
    path = layout.segment("one", 0) / next(stored.file for stored in schema.TABLES if stored.name == table)
    damage(path, random.Random(0))
    result = moewh(layout, "query", table, "--format", "csv")
    assert result.exit_code == 1
    assert str(path) in result.stderr


def test_query_over_a_broken_name_is_one_line(layout: Layout) -> None:
    """DuckDB quotes the name in its message, whose bytes are then not valid text."""
    path = layout.segment("one", 0) / schema.ROUTING.file
    path.write_bytes(path.read_bytes().replace(b"token_id", b"token_\xe9d"))
    result = moewh(layout, "query", "routing", "--format", "csv")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert r"token_\xe9d" in result.stderr


@pytest.mark.parametrize("damage", [flip, swap], ids=lambda damage: damage.__name__)
def test_query_over_silent_damage_is_refused_with_verify(damage: Any, layout: Layout) -> None:
    """DuckDB silently gives wrong rows here; `--verify` prevents that."""
    path = layout.segment("one", 0) / schema.EXPERT_COUNTS.file
    before = moewh(layout, "query", "expert_load", "--format", "csv", "--verify").stdout
    assert before
    damage(path, random.Random(0))
    result = moewh(layout, "query", "expert_load", "--format", "csv", "--verify")
    assert (result.exit_code, result.stdout) == (1, "")
    assert str(path) in result.stderr
    assert "moewh verify --repair" in result.stderr
