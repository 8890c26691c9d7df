"""SQL made to harm: `opgrpo sql` reads the store's own tables, and nothing else is read, written, loaded or reached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import StoreError
from opgrpo_data.store import Store
from tests.opgrpo_data.factories import folder
from tests.opgrpo_data.hostile import one_line, small_store

INDEX = f"{folder()}/00000.parquet"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """See small_store."""
    return small_store(str(tmp_path / "store"))


RUN_TEXT = (
    "json_execute_serialized_sql(json_serialize_sql("
    "'WITH w AS (COPY (SELECT 1) TO ''{index}'' (FORMAT parquet, USE_TMP_FILE false)) FROM w'))"
)
HOSTILE_SQL = [
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/*')",
    "SELECT * FROM read_csv('{secret}')",
    "SELECT * FROM '{secret}'",
    "SELECT * FROM read_text('{link}')",
    "SELECT * FROM read_csv('{link}')",
    "SELECT * FROM '{link}'",
    "SELECT * FROM read_text('{store}/trajectories/run=run-0/iter=000000/../../../../secret.csv')",
    "SELECT * FROM read_text('file://{secret}')",
    "SELECT * FROM read_text('{store}/store.json')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM glob('{store}/*')",
    "SELECT * FROM read_parquet('https://example.com/x.parquet')",
    "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
    "SELECT * FROM read_csv('hf://datasets/x/y.csv')",
    "SELECT getenv('HOME')",
    "SELECT * FROM duckdb_secrets(); SELECT 1",
    "COPY (SELECT 1) TO '{out}'",
    "COPY rewards TO '{store}/rewards/x.parquet' (FORMAT parquet)",
    "COPY (SELECT 1) TO '{index}'",
    "EXPORT DATABASE '{out}'",
    "ATTACH '{out}' AS other",
    "ATTACH '{secret}' AS other (READ_ONLY)",
    "INSTALL httpfs",
    "LOAD '{out}'",
    "PRAGMA database_list",
    "PRAGMA enable_profiling='json'",
    "SET enable_external_access = true",
    "SET allowed_directories = ['/']",
    "SET home_directory = '{out}'",
    "RESET lock_configuration",
    "CREATE SECRET s (TYPE s3)",
    "IMPORT DATABASE '{out}'",
    "CHECKPOINT",
    "USE memory",
    "WITH w AS (COPY (SELECT 1) TO '{out}') FROM w",
    "WITH w AS (COPY (SELECT 1) TO '{index}' (FORMAT parquet, USE_TMP_FILE false)) SELECT 1",
    "WITH v AS (SELECT 1), w AS MATERIALIZED (COPY (SELECT 1) TO '{index}' (FORMAT csv)) FROM v",
    "DESCRIBE WITH w AS (COPY (SELECT 1) TO '{index}') SELECT 1",
    "FROM query('WITH w AS (COPY (SELECT 1) TO ''{index}'' (FORMAT csv)) SELECT 1')",
    "WITH w AS (DELETE FROM rewards RETURNING *) FROM w",
    "UPDATE EXTENSIONS",
    f"FROM {RUN_TEXT}",
    f'SELECT 1 WHERE EXISTS (FROM system.main."JSON_execute_serialized_SQL"({RUN_TEXT.partition("(")[2]})',
    f"FROM query('FROM {RUN_TEXT.replace(chr(39), 2 * chr(39))}')",
    "FROM query('SELECT 1')",
    "FROM query_table('rewards')",
    "FROM arrow_scan(0, 0, 0)",
    "SELECT * FROM query('COPY (SELECT 1) TO ''{out}''')",
    "SELECT * FROM query_table('/etc/passwd')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT * FROM read_text(''{secret}'')'))",
    "SELECT * FROM sniff_csv('{secret}')",
    "SELECT * FROM parquet_metadata('{secret}')",
    "SELECT * FROM sqlite_scan('{secret}', 't')",
    "SELECT * FROM enable_logging(storage = 'file', storage_path = '{out}')",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
    "SELECT 1; COPY (SELECT 1) TO '{out}'",
    "INSERT INTO prompts VALUES ('p', 't', '{{}}', 'train')",
    "CREATE TABLE mine AS SELECT * FROM read_text('{secret}')",
]


@pytest.fixture
def catalog(store: Store, tmp_path: Path) -> Iterator[tuple[Catalog, dict[str, str]]]:
    """A catalog, and paths that its queries must not reach."""
    secret, link = tmp_path / "secret.csv", Path(store.directory.root, "rewards", "link.csv")
    secret.write_text("a,b\n1,hidden\n")
    link.symlink_to(secret)
    places = {"secret": secret, "link": link, "out": tmp_path / "out", "store": store.directory.root}
    yield Catalog(store), {name: str(path) for name, path in places.items()} | {"index": store.directory.path(INDEX)}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sql", HOSTILE_SQL)
def test_hostile_sql_is_refused(sql: str, catalog: tuple[Catalog, dict[str, str]], store: Store) -> None:
    asked, places = catalog
    root = Path(store.directory.root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(StoreError) as caught:
        asked.query(sql.format(**places))
    assert one_line(caught.value)
    assert "hidden" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert asked.query("SELECT count(*) AS n FROM rewards").to_pylist() == [{"n": 2}]
