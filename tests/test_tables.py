"""The DuckDB file is rebuilt from Parquet files; a failed rebuild leaves the old one."""

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from puzzle_dag.tables import TablesError, build_tables


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(pa.table({"layer": [0, 0], "kl": [0.1, 0.2]}), paths[0])
    pq.write_table(pa.table({"layer": [1], "kl": [0.3], "note": ["new"]}), paths[1])
    return paths


def query(path, sql):
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute(sql).fetchall()


def test_all_rows_of_all_files_and_nothing_left_beside(files, tmp_path):
    path = tmp_path / "out" / "tables.duckdb"
    assert build_tables({"scores": files, "costs": files[:1], "empty": []}, path) == {"scores": 3, "costs": 2}
    assert query(path, "SELECT layer, kl, note FROM scores ORDER BY kl") == [(0, 0.1, None), (0, 0.2, None), (1, 0.3, "new")]
    assert [p.name for p in path.parent.iterdir()] == ["tables.duckdb"]


def test_readers_of_the_old_file_are_not_disturbed(files, tmp_path):
    path = tmp_path / "tables.duckdb"
    build_tables({"scores": files[:1]}, path)
    with duckdb.connect(str(path), read_only=True) as reader:
        assert build_tables({"scores": files}, path) == {"scores": 3}
        assert reader.execute("SELECT count(*) FROM scores").fetchall() == [(2,)]
    assert query(path, "SELECT count(*) FROM scores") == [(3,)]


@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_bad_file_is_named_and_the_old_tables_stay(files, tmp_path, damage):
    path = tmp_path / "out" / "tables.duckdb"
    build_tables({"scores": files}, path)
    files[1].unlink()
    if damage == "garbage":
        files[1].write_bytes(b"PAR1 no parquet")
    with pytest.raises(TablesError, match=r"'scores'.*b\.parquet"):
        build_tables({"scores": files}, path)
    assert query(path, "SELECT count(*) FROM scores") == [(3,)]
    assert [p.name for p in path.parent.iterdir()] == ["tables.duckdb"]


@pytest.mark.parametrize("name", ["Scores", "a-b", 'x" AS SELECT 1; --', ""])
def test_names_are_plain(files, tmp_path, name):
    with pytest.raises(TablesError, match="lower-case"):
        build_tables({name: files}, tmp_path / "t.duckdb")
