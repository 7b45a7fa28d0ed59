import polars as pl
import pytest

from kvsim import __version__, documents
from kvsim.batch import failure_row, read_metadata, report_row, schema, to_frame, write_results
from kvsim.errors import InfeasibleScenario, InvalidSpec
from kvsim.report import SCHEMA_VERSION
from kvsim.scenario import Scenario

SCENARIO = Scenario(model="=cmd()", device="h100-sxm", workload="chat")


@pytest.fixture
def frame(make_report):
    failure = failure_row(InfeasibleScenario("-no room"), "simulation", SCENARIO, {}, {"seed": 1})
    return to_frame([report_row(make_report(), Scenario(model="m", device="d", workload="chat"), {}), failure])


def test_parquet_round_trip_and_footer(frame, tmp_path):
    path = tmp_path / "new" / "r.parquet"
    write_results(frame, path)
    assert pl.read_parquet(path).equals(frame)
    assert pl.read_parquet_schema(path) == pl.Schema(schema())
    assert read_metadata(path) == {"kvsim.schema_version": str(SCHEMA_VERSION), "kvsim.version": __version__}


def test_equal_rows_give_equal_bytes(frame, tmp_path):
    for name in ("a.parquet", "b.parquet"):
        write_results(frame, tmp_path / name)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_csv_cells_cannot_be_formulas(frame, tmp_path):
    path = tmp_path / "r.csv"
    write_results(frame, path)
    rows = pl.read_csv(path, infer_schema=False)
    assert rows["model"][1] == "'=cmd()"
    assert rows["reason"][1] == "'-no room"
    assert rows["strategy"][0] == "native"


def test_a_crash_while_writing_keeps_the_old_file(frame, tmp_path, monkeypatch):
    path = tmp_path / "r.parquet"
    write_results(frame.head(1), path)
    before = path.read_bytes()

    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(documents.os, "fsync", fail)
    with pytest.raises(InvalidSpec, match=r"cannot write: No space left"):
        write_results(frame, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_writing_keeps_the_old_file(frame, tmp_path, monkeypatch):
    path = tmp_path / "r.parquet"
    path.write_bytes(b"old")

    def interrupt(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(documents.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_results(frame, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_impossible_paths_are_refused_first(frame, tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "file").write_text("")
    for path, expected in (
        (tmp_path / "folder.parquet", "is a folder"),
        (tmp_path / "r.xlsx", "must end in .parquet or .csv"),
        (tmp_path / "file" / "r.parquet", "is a file, not a folder"),
    ):
        with pytest.raises(InvalidSpec) as caught:
            write_results(frame, path)
        assert expected in str(caught.value)
