"""Copies that lack something, or hold something twice: answers stay right or are refused, and repairs work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
from click.testing import CliRunner, Result

from moewh.cli.main import main
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import SCHEMA_RUN
from tests.support.damage import sound_warehouse

pytestmark = pytest.mark.published_file

TABLES = ("expert_load", "expert_outputs", "expert_output_counts", "expert_geometry", "router_similarity")


def moewh(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--warehouse", str(layout.root)])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A warehouse of two runs, one of them sealed."""
    layout = sound_warehouse(tmp_path_factory.mktemp("sound") / "wh")
    assert moewh(layout, "seal", "one").exit_code == 0
    assert moewh(layout, "refresh").exit_code == 0
    return layout


@pytest.fixture
def copy(sound: Layout, tmp_path: Path) -> Layout:
    shutil.copytree(sound.root, tmp_path / "wh", symlinks=True)
    return Layout(tmp_path / "wh")


@pytest.fixture(scope="module")
def whole(sound: Layout) -> list[str]:
    """The answers of the original."""
    return answers(sound)


def answers(layout: Layout) -> list[str]:
    found = [moewh(layout, "query", "-c", f"from {table} order by all", "--format", "csv") for table in TABLES]
    assert [result.exit_code for result in found] == [0] * len(TABLES), [result.stderr for result in found]
    return [result.stdout for result in found]


def names(layout: Layout) -> set[str]:
    found = (path.relative_to(layout.root).as_posix() for path in layout.root.rglob("*"))
    return {name for name in found if "/mark-" not in name and not name.startswith(("quarantine", ".staging"))}


def lose(link: Path) -> None:
    link.unlink()


def become_text(link: Path) -> None:
    target = link.readlink()
    link.unlink()
    link.write_text(str(target))


def lead_nowhere(link: Path) -> None:
    link.unlink()
    link.symlink_to("nowhere")


@pytest.mark.parametrize("change", [lose, become_text, lead_nowhere])
def test_a_plain_shell_refuses_a_copy_that_lost_a_link(change: Callable[[Path], None], copy: Layout) -> None:
    assert moewh(copy, "refresh").exit_code == 0
    change(copy.unsealed("two") / "segments")
    with duckdb.connect(str(copy.database), read_only=True) as shell:
        for table in ("runs", "expert_load", "pair_totals", "co_routing"):
            with pytest.raises(duckdb.Error, match="run two is not sealed, and a copy lost the link"):
                shell.execute(f"from {table}").fetchall()
        assert moewh(copy, "refresh").exit_code == 0
        assert shell.execute("select count(*) from runs").fetchall() == [(2,)]


def test_a_plain_shell_reads_a_run_without_segments_and_a_copy_that_followed_the_links(
    copy: Layout, tmp_path: Path
) -> None:
    followed = Layout(tmp_path / "followed")
    shutil.copytree(copy.root, followed.root)
    query = "select run_id, sum(tokens) from expert_load group by run_id order by run_id"
    with duckdb.connect(str(copy.database), read_only=True) as shell:
        shell.execute(f"set variable moewh_root = '{copy.root}'")
        before = shell.execute(query).fetchall()
        shell.execute(f"set variable moewh_root = '{followed.root}'")
        assert shell.execute(query).fetchall() == before
        shutil.rmtree(copy.segments("two"))  # as where a process was killed that deleted the run
        shell.execute(f"set variable moewh_root = '{copy.root}'")
        assert shell.execute("select run_id, segments from runs order by run_id").fetchall()[1] == ("two", 0)


@pytest.mark.parametrize("change", [lose, become_text, lead_nowhere])
def test_repair_links_the_segments_again(change: Callable[[Path], None], copy: Layout, whole: list[str]) -> None:
    change(copy.unsealed("two") / "segments")
    found = moewh(copy, "verify", "--repair")
    assert found.stdout.startswith("unsealed/run_id=two: does not link to a run's segments"), found.output
    assert "all as committed" in moewh(copy, "verify").stdout
    assert answers(copy) == whole


@pytest.mark.parametrize("run_id", ["two-copy", "three"])
def test_a_link_of_no_run_is_refused_until_repaired(run_id: str, copy: Layout, whole: list[str]) -> None:
    shutil.copytree(copy.unsealed("two"), copy.unsealed(run_id), symlinks=True)
    assert f"run_id={run_id} does not link to the run's segments" in (said := moewh(copy, "query", "routes").stderr)
    assert f"Run `moewh verify --repair {copy.option}`." in said
    assert moewh(copy, "verify", "--repair").exit_code == 1
    assert answers(copy) == whole


def test_refresh_repairs_a_copy_without_links_and_zero_rows(copy: Layout, sound: Layout, whole: list[str]) -> None:
    shutil.rmtree(copy.sealed(SCHEMA_RUN))
    lose(copy.unsealed("two") / "segments")
    assert f"Run `moewh refresh {copy.option}`." in moewh(copy, "query", "routes").stderr
    assert moewh(copy, "refresh").exit_code == 0
    assert answers(copy) == whole
    assert names(copy) == names(sound)


def test_refresh_repairs_a_copy_without_empty_files(copy: Layout, sound: Layout, whole: list[str]) -> None:
    """Some programs copy no empty files: then every mark is lost, those of sealed runs too."""
    assert moewh(copy, "seal", "one").exit_code == moewh(sound, "seal", "one").exit_code == 0
    for file in copy.root.rglob("*"):
        if file.is_file() and not file.stat().st_size:
            file.unlink()
    assert "is neither sealed nor unsealed" in moewh(copy, "query", "expert_load").stderr
    assert moewh(copy, "refresh").exit_code == 0
    assert "all as committed" in moewh(copy, "verify").stdout
    assert answers(copy) == whole


LOST = ["sealed/run_id=~schema", "geometry/run_id=~schema", "geometry/run_id=~schema/expert_geometry.parquet"]


@pytest.mark.parametrize("lost", LOST)
def test_rows_are_not_lost_with_the_zero_row_files(lost: str, copy: Layout, sound: Layout, whole: list[str]) -> None:
    path = copy.root / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert answers(copy) == whole
    found = moewh(copy, "verify", "--repair")
    assert f"{lost}: is missing" in found.stdout
    assert "all as committed" in moewh(copy, "verify").stdout
    assert names(copy) == names(sound)


def test_verify_reports_zero_row_files_that_queries_need(copy: Layout, whole: list[str]) -> None:
    shutil.rmtree(copy.unsealed(SCHEMA_RUN))
    found = moewh(copy, "verify", "--repair")
    assert f"unsealed/run_id=~schema: is missing; `moewh refresh {copy.option}` recreates it\n" in found.stdout
    assert "all as committed" in moewh(copy, "verify").stdout
    assert answers(copy) == whole


MARKS = ["unsealed/run_id=two", f"unsealed/run_id={SCHEMA_RUN}", f"sealed/run_id={SCHEMA_RUN}"]
LISTS = [f"runs/run_id={SCHEMA_RUN}", f"segments/run_id={SCHEMA_RUN}/segment=0", f"sealed/run_id={SCHEMA_RUN}"]
LOST_ALONE = [*(f"{folder}/mark-*" for folder in MARKS), *(f"{folder}/manifest.json" for folder in LISTS)]


@pytest.mark.parametrize("lost", LOST_ALONE)
def test_refresh_writes_a_lost_mark_or_manifest_again(lost: str, copy: Layout, whole: list[str]) -> None:
    (path,) = copy.root.glob(lost)
    path.unlink()
    assert moewh(copy, "verify").exit_code == 1
    assert moewh(copy, "refresh").exit_code == 0
    assert "all as committed" in moewh(copy, "verify").stdout
    assert answers(copy) == whole


@pytest.mark.parametrize("lost", ["runs/run_id=~schema", "segments/run_id=~schema", "runs", "segments"])
def test_half_a_copy_is_not_taken_for_no_warehouse(lost: str, copy: Layout, whole: list[str]) -> None:
    shutil.rmtree(copy.root / lost)
    for command in ("verify", "runs"):
        said = moewh(copy, command).stderr
        assert f"the warehouse at {copy.root} lacks {lost}" in said
        assert f"Copy the rest, or run `moewh refresh {copy.option}`" in said
    assert moewh(copy, "refresh").exit_code == (lost in ("runs", "segments"))
    complete = moewh(copy, "verify").exit_code == 0
    assert complete == lost.endswith(SCHEMA_RUN)
    if complete:
        assert answers(copy) == whole


@pytest.mark.parametrize(
    "lost", ["segments/run_id=one", "segments/run_id=one/segment=0", "segments/run_id=one/segment=1"]
)
def test_rows_are_not_answered_without_the_segments_of_a_sealed_run(lost: str, copy: Layout) -> None:
    """As an interrupted copy leaves them: counts would be whole, and rows would not."""
    shutil.rmtree(copy.root / lost)
    number = 2 if lost.endswith("one") else 1
    for command in (["query", "routes"], ["query", "expert_load"], ["runs"], ["check"], ["refresh"]):
        refused = moewh(copy, *command)
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
        assert f"run_id=one lacks {number} of the run's 2 segments, so rows would be missing." in refused.stderr
    assert "moewh ingest --model" in moewh(copy, "verify", "--repair").stdout
    assert "one,running," in moewh(copy, "runs", "--format", "csv").stdout
    assert moewh(copy, "runs", "--delete", "one", "--yes").exit_code == 0
    assert moewh(copy, "query", "routes", "--format", "csv").exit_code == 0


@pytest.mark.parametrize(
    "lost",
    ["", "/run.parquet", "/layers.parquet", "/experts.parquet", "/vocabulary.parquet"],
    ids=lambda lost: lost[1:],
)
@pytest.mark.parametrize("run_id", ["one", "two"])
def test_a_run_is_not_left_out_because_a_copy_lost_its_files(run_id: str, lost: str, copy: Layout) -> None:
    """Views join the rows of these files: counts of a run without them would be missing from their answers."""
    path = Path(f"{copy.run(run_id)}{lost}")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    for command in (["query", "routes"], ["query", "domain_specialization"], ["check"], ["refresh"]):
        refused = moewh(copy, *command)
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
        assert f"runs/run_id={run_id} lacks " in refused.stderr
        assert "so the run would be missing from answers." in refused.stderr
    assert moewh(copy, "verify").exit_code == 1
    moewh(copy, "verify", "--repair")
    assert moewh(copy, "verify").exit_code == 1
    assert (moewh(copy, "runs").exit_code == 0) == bool(lost)  # a folder that is gone cannot be quarantined


def test_a_sealed_run_without_its_segments_is_ingested_again_not_sealed(copy: Layout) -> None:
    shutil.rmtree(copy.segment("one", 1))
    for arguments in (["verify"], ["verify", "--repair"]):
        said = moewh(copy, *arguments).stdout
        assert "sealed/run_id=one/segment.parquet: has segment 1, which does not exist" in said
        assert "moewh ingest --model" in said
        assert "moewh seal" not in said


COPIED = ["sealed/run_id=one", "runs/run_id=two", "segments/run_id=one", "geometry/run_id=one"]
COPIED += ["unsealed/run_id=two", "segments/run_id=one/segment=0"]
ENDS = [" (1)", " - Copy", " (conflicted copy)"]


@pytest.mark.parametrize("folder", COPIED)
def test_repair_moves_a_sync_programs_copy_and_nothing_else(folder: str, copy: Layout, sound: Layout) -> None:
    for end in ENDS:
        shutil.copytree(copy.root / folder, f"{copy.root / folder}{end}", symlinks=True)
    before = {path for path in copy.root.glob("*/*/mark-*") if not any(end in str(path) for end in ENDS)}
    assert moewh(copy, "refresh").exit_code == 0
    assert "writes it again" not in moewh(copy, "verify").stdout
    repaired = moewh(copy, "verify", "--repair").stdout
    for end in ENDS:
        assert f"moved to quarantine/{folder}{end}\n" in repaired
    assert "writes it again" not in repaired
    assert "all as committed" in moewh(copy, "verify").stdout
    assert names(copy) == names(sound)
    assert set(copy.root.glob("*/*/mark-*")) == before
