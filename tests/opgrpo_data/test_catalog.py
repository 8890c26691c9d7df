"""SQL over a store: every view is there, numbers are exact, and no statement reads or writes anything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opgrpo_data import buffer
from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.schema import DENSITIES, EVALS, POLICIES, REWARDS, RUNS, UPDATES, table_of
from opgrpo_data.shards import write_shard
from opgrpo_data.store import TABLES, Store, iteration_folder
from opgrpo_data.upkeep import compaction
from tests.opgrpo_data.factories import (
    RUN,
    buffer_rule,
    folder,
    no_buffer,
    overwrite,
    plan,
    plan_rule,
    records,
    reward_row,
    rewards,
    shard_rows,
    trajectories,
)

VIEWS = {
    "prompts", "policies", "runs", "trajectories", "rewards", "reward_errors",
    "buffer", "plans", "densities", "updates", "update_steps", "update_summary", "evals", "quarantine", "dropped",
}  # fmt: skip
SUMMARIES = {
    "update_steps": [
        "run_id", "iteration", "optimizer_step", "role", "step",
        "pairs", "ratio_mean", "ratio_std", "ratio_min", "ratio_max", "clip_fraction", "kl", "path_variance",
    ],
    "update_summary": [
        "run_id", "iteration", "role",
        "trajectories", "groups", "dead_groups", "reward_mean", "age_mean", "age_max",
        "weight_mean", "weight_min", "weight_max", "predicted_ess", "weight_ess", "steps_mean",
    ],
}  # fmt: skip
"""Columns of the views that are more than a table."""
LEARNING_CURVE = (
    "SELECT iteration, count(*) AS n, avg(value) AS reward FROM trajectories JOIN rewards USING (trajectory_id) "
    "GROUP BY 1 ORDER BY 1"
)


def fill(store: Store, between: Callable[[], object] = lambda: None) -> Store:
    """Two iterations of one run: 3 + 2 trajectories, one that no reward could judge, one damaged. `between` them: a call."""
    store.add_prompts([{"text": "a red square", "metadata": {"kind": "single"}}], "train")
    store.add_run(RUN, {"config": {"name": "run", "seed": 7}, "command": ["opgrpo", "run"], "software": {"torch": "2"}})
    store.add_policy("policy-0", {"family": "sd3", "kind": "base", "has_weights": False, "parameters": 10}, None)
    values: list[dict[int, float]] = [{0: 0.25, 1: 0.5}, {0: 1.0, 1: 0.75}]
    snapshot = no_buffer()
    for iteration, count in enumerate((3, 2)):
        members = records(count, iteration=iteration, run_id=RUN)
        members = [type(m)({**m.row, "trajectory_id": f"i{iteration}-{k}"}, m.latents, m.media, "png", m.note)
                   for k, m in enumerate(members)]  # fmt: skip
        write_shard(store.directory, folder(iteration), "00000", members)
        judged = [
            reward_row(f"i{iteration}-{k}", value, detail=json.dumps({"shape": value / 2, "colour": {"name": "red"}}))
            for k, value in values[iteration].items()
        ]
        if iteration == 0:
            judged.append(reward_row("i0-2", None, detail=None, error="ValueError: no picture"))
        store.publish_table(f"rewards/reward=taste/run={RUN}/iter={iteration:06d}/00000.v1.000.parquet", rewards(judged))
        rows = trajectories([row for row in shard_rows(store) if row["iteration"] == iteration])
        good = rewards([row for row in judged if row["error"] is None])
        found = buffer.candidates(rows, good)
        snapshot = buffer.select(snapshot, found, set(), run_id=RUN, iteration=iteration, rule=buffer_rule(0.5))
        store.publish_table(f"{iteration_folder('buffers', RUN, iteration)}.parquet", snapshot)
        planned = plan(rows, good, plan_rule(), iteration=iteration)
        store.publish_table(f"{iteration_folder('plans', RUN, iteration)}.parquet", planned)
        if iteration == 0:
            between()
    update = {
        "run_id": RUN,
        "iteration": 0,
        "optimizer_step": 0,
        "trajectory_id": "i0-0",
        "group_id": "g0",
        "role": "fresh",
        "age": 0,
        "reward": 0.25,
        "advantage": -0.125 / 0.1251,
        "loss": -0.5,
        "train_steps": [0, 1],
        "path_variance": [0.0, 0.0],
        "ratio": [1.0, 1.5],
        "clipped": [False, True],
        "kl": [0.0, 0.0],
        "importance_weight": 1.0,
        "grad_norm": 0.1,
    }
    store.publish_table(f"{iteration_folder('updates', RUN, 0)}.parquet", table_of([update], UPDATES))
    judged_again = {"run_id": RUN, "iteration": 1, "trajectory_id": "i0-0", "old_logprob": [-1.0], "path_variance": [0.5]}
    store.publish_table(f"{iteration_folder('densities', RUN, 1)}.parquet", table_of([judged_again], DENSITIES))
    evaluated = {"run_id": RUN, "iteration": 0, "reward": "taste", "value": 0.5}
    store.publish_table(f"{iteration_folder('evals', RUN, 0)}/taste.v1.parquet", table_of([evaluated], EVALS))
    store.quarantine("i1-1", CorruptionError("x.tar", "i1-1.latents.npy latent 0", 5, None))
    return store


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A filled store on disk. Do not change it."""
    return fill(Store.create(str(tmp_path_factory.mktemp("filled") / "store")))


@pytest.fixture(scope="module")
def catalog(filled: Store) -> Catalog:
    return Catalog(filled)


def rows(catalog: Catalog, sql: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = catalog.query(sql).to_pylist()
    return found


# -- views ---------------------------------------------------------------------------------------------------------------


def test_every_view_exists_on_an_empty_store(tmp_path: Path) -> None:
    empty = Catalog(Store.create(str(tmp_path)))
    assert {row["name"] for row in rows(empty, "SHOW TABLES")} >= VIEWS
    for view in VIEWS:
        assert rows(empty, f"SELECT * FROM {view}") == []
    assert rows(empty, LEARNING_CURVE) == []


def test_every_view_of_a_filled_store_has_its_rows(catalog: Catalog) -> None:
    counts = {view: rows(catalog, f"SELECT count(*) AS n FROM {view}")[0]["n"] for view in VIEWS}
    assert counts == {
        "prompts": 1, "policies": 1, "runs": 1, "trajectories": 5, "rewards": 4, "reward_errors": 1,
        "buffer": 2, "plans": 4, "densities": 1, "updates": 1, "update_steps": 2, "update_summary": 1,
        "evals": 1, "quarantine": 1, "dropped": 0,
    }  # fmt: skip


def test_columns_are_the_same_on_an_empty_and_a_filled_store(catalog: Catalog, tmp_path: Path) -> None:
    empty = Catalog(Store.create(str(tmp_path)))
    kinds = {"buffer": "buffers", "reward_errors": "rewards"}
    for view in VIEWS:
        described = [rows(each, f"SELECT column_name, column_type FROM (DESCRIBE {view})") for each in (empty, catalog)]
        assert described[0] == described[1]
        own = {"policies": POLICIES.names, "runs": RUNS.names, **SUMMARIES}
        expected = own[view] if view in own else TABLES[kinds.get(view, view)].schema.names
        assert [column["column_name"] for column in described[0]] == expected


def test_learning_curve_is_exact(catalog: Catalog) -> None:
    assert rows(catalog, LEARNING_CURVE) == [
        {"iteration": 0, "n": 2, "reward": 0.375},
        {"iteration": 1, "n": 2, "reward": 0.875},
    ]


def test_rows_without_a_value_are_errors_not_rewards(catalog: Catalog) -> None:
    assert [row["trajectory_id"] for row in rows(catalog, "FROM rewards ORDER BY 1")] == ["i0-0", "i0-1", "i1-0", "i1-1"]
    [error] = rows(catalog, "FROM reward_errors")
    assert (error["trajectory_id"], error["value"], error["error"]) == ("i0-2", None, "ValueError: no picture")


def test_json_columns_can_be_queried(catalog: Catalog) -> None:
    found = rows(
        catalog, "SELECT (detail ->> 'shape')::DOUBLE AS shape, detail ->> '$.colour.name' AS c FROM rewards ORDER BY 1"
    )
    assert found == [{"shape": shape, "c": "red"} for shape in (0.125, 0.25, 0.375, 0.5)]
    assert rows(catalog, "SELECT metadata ->> 'kind' AS kind FROM prompts") == [{"kind": "single"}]
    assert rows(catalog, "SELECT config ->> 'seed' AS seed, command ->> 1 AS stage FROM runs") == [
        {"seed": "7", "stage": "run"}
    ]


def test_lineage_from_an_update_to_its_bytes(catalog: Catalog, filled: Store) -> None:
    sql = (
        "SELECT t.latents_file, t.latents_offset, t.latents_crc32, p.advantage, u.ratio, q.kind FROM updates u "
        "JOIN plans p USING (run_id, iteration, trajectory_id) JOIN trajectories t USING (trajectory_id) "
        "JOIN policies q USING (policy_id)"
    )
    [found] = rows(catalog, sql)
    [row] = [row for row in shard_rows(filled) if row["trajectory_id"] == "i0-0"]
    assert {name: found[name] for name in ("latents_file", "latents_offset", "latents_crc32")} == {
        name: row[name] for name in ("latents_file", "latents_offset", "latents_crc32")
    }
    assert (found["ratio"], found["kind"]) == ([1.0, 1.5], "base")
    assert found["advantage"] == pytest.approx(-0.125 / 0.1251)


def test_buffer_view_shows_every_iteration(catalog: Catalog) -> None:
    found = rows(catalog, "SELECT iteration, trajectory_id, age, decayed_reward FROM buffer ORDER BY 1")
    assert found == [
        {"iteration": 0, "trajectory_id": "i0-1", "age": 0, "decayed_reward": 0.5},
        {"iteration": 1, "trajectory_id": "i1-0", "age": 0, "decayed_reward": 1.0},
    ]


def test_a_catalog_shows_what_was_committed_when_it_was_opened(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    write_shard(store.directory, folder(), "00000", records(1))
    before = Catalog(store)
    write_shard(store.directory, folder(), "00001", records(2))
    assert [rows(each, "SELECT count(*) AS n FROM trajectories")[0]["n"] for each in (before, Catalog(store))] == [1, 3]


def test_tars_without_an_index_are_invisible(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    write_shard(store.directory, folder(), "00000", records(2))
    (tmp_path / folder() / "00000.parquet").unlink()
    assert rows(Catalog(store), "SELECT * FROM trajectories") == []


def test_an_object_store_can_be_asked_too(catalog: Catalog) -> None:
    remote = Catalog(fill(Store.create("memory://catalog")))
    for view in VIEWS:
        same = "SELECT count(*) AS n, count(DISTINCT {0}) AS d FROM {0}".format(view)  # noqa: UP032
        assert rows(remote, same) == rows(catalog, same)
    assert rows(remote, LEARNING_CURVE) == rows(catalog, LEARNING_CURVE)


@pytest.mark.parametrize("name", ['it\'s "the" store', "runs[1]", "a*", "100% {x} ü?", "semi;colon -- x"])
def test_the_path_of_a_store_may_have_any_name(name: str, tmp_path: Path) -> None:
    fill(Store.create(str(tmp_path / "abc")))  # which `a*` must not match
    store = fill(Store.create(str(tmp_path / name)))
    found = Catalog(store)
    assert rows(found, LEARNING_CURVE)[0] == {"iteration": 0, "n": 2, "reward": 0.375}
    assert rows(found, "SELECT text FROM prompts") == [{"text": "a red square"}]


def test_plain_duckdb_reads_the_indexes(filled: Store) -> None:
    root = filled.directory.root
    with duckdb.connect() as plain:
        found = plain.sql(
            f"SELECT t.iteration, count(*), avg(value) FROM '{root}/trajectories/**/*.parquet' t "
            f"JOIN '{root}/rewards/**/*.parquet' r USING (trajectory_id) WHERE error IS NULL GROUP BY 1 ORDER BY 1"
        ).fetchall()
    assert found == [(0, 2, 0.375), (1, 2, 0.875)]


# -- read-only -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("COPY prompts TO '{out}'", "COPY"),
        ("COPY (SELECT 1) TO '{out}' (FORMAT parquet)", "COPY"),
        ("EXPORT DATABASE '{out}'", "EXPORT"),
        ("ATTACH '{out}'", "ATTACH"),
        ("INSERT INTO prompts VALUES ('p', 't', '{{}}', 'train')", "INSERT"),
        ("UPDATE prompts SET text = 'x'", "UPDATE"),
        ("DELETE FROM policies", "DELETE"),
        ("DROP VIEW prompts", "DROP"),
        ("CREATE TABLE mine (i INT)", "CREATE"),
        ("CREATE OR REPLACE VIEW rewards AS SELECT 1", "CREATE"),
        ("CREATE MACRO f(x) AS x", "CREATE"),
        ("ALTER VIEW prompts RENAME TO other", "ALTER"),
        ("PRAGMA database_list", "PRAGMA"),
        ("SET enable_external_access = true", "SET"),
        ("RESET allowed_paths", "SET"),
        ("INSTALL httpfs", "LOAD"),
        ("LOAD httpfs", "LOAD"),
        ("CALL pragma_version()", "CALL"),
        ("PREPARE p AS SELECT 1", "PREPARE"),
        ("VACUUM", "VACUUM"),
    ],
)
def test_everything_but_a_query_is_refused(sql: str, kind: str, catalog: Catalog, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoreError, match=f"the store is read-only to SQL: {kind} is refused, a SELECT is not"):
        catalog.query(sql.format(out=out))
    assert not out.exists()
    assert rows(catalog, "SELECT count(*) AS n FROM prompts") == [{"n": 1}]


@pytest.mark.parametrize(
    ("sql", "count"), [("SELECT 1; SELECT 2", 2), ("SELECT 1; DROP VIEW prompts", 2), ("", 0), ("-- nothing", 0), (";", 0)]
)
def test_one_statement_at_a_time(sql: str, count: int, catalog: Catalog) -> None:
    with pytest.raises(StoreError, match=f"expected one SQL statement, got {count}"):
        catalog.query(sql)


def test_a_closing_semicolon_is_no_second_statement(catalog: Catalog) -> None:
    assert rows(catalog, "SELECT 1 AS one;  ") == [{"one": 1}]


def test_no_other_file_can_be_read(catalog: Catalog, filled: Store, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a,b\n1,2\n")
    inside = Path(filled.directory.root)
    (inside / "note.csv").write_text("a,b\n1,2\n")
    tar = inside / shard_rows(filled)[0]["latents_file"]
    for path in ("/etc/passwd", secret, inside / "note.csv", inside / "store.json", tar, "https://example.com/x.csv"):
        for function in ("read_csv", "read_text", "read_blob", "read_parquet", "read_json", "glob"):
            with pytest.raises(StoreError, match="Permission Error: Cannot access"):
                catalog.query(f"SELECT * FROM {function}('{path}')")
        with pytest.raises(StoreError, match=r"does not exist|Cannot access"):
            catalog.query(f"SELECT * FROM '{path}'")
    with pytest.raises(StoreError, match="the function query is refused"):
        catalog.query("SELECT * FROM query('COPY prompts TO ''/tmp/x''')")


def test_python_objects_are_not_tables(catalog: Catalog) -> None:
    secrets = rewards({"t": 1.0})
    assert secrets.num_rows == 1
    with pytest.raises(StoreError, match="Table with name secrets does not exist"):
        catalog.query("SELECT * FROM secrets")


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", 'SQL: Parser Error: syntax error at or near "SELEC"'),
        ("SELECT * FROM trajectory", "SQL: Catalog Error: Table with name trajectory does not exist.*trajectories"),
        ("FROM buffers", 'SQL: Catalog Error: Table with name buffers does not exist! Did you mean "buffer"[?]'),
        ("SELECT rewrd FROM rewards", 'SQL: Binder Error: .*"rewrd" not found.*'),
        ("SELECT text::INT FROM prompts", "SQL: Conversion Error: Could not convert string 'a red square' to INT32"),
    ],
)
def test_wrong_sql_is_told_in_one_line(sql: str, message: str, catalog: Catalog) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        catalog.query(sql)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        *("DESCRIBE rewards", "SUMMARIZE rewards", "SHOW TABLES", "FROM rewards", "VALUES (1)", "(SELECT 1) -- so far"),
        """SELECT '"type":"COPY_QUERY_NODE"' AS text""",
        "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r WHERE n < 3), t AS MATERIALIZED (FROM r) FROM t",
        f"SELECT {' + '.join(['1'] * 400)}",
        "SELECT version(), i, j FROM range(3) t(i), unnest([1, 2]) u(j), json_each('[1]')",
        "FROM duckdb_views() SELECT view_name",
    ],
)
def test_other_ways_to_ask_are_queries_too(sql: str, catalog: Catalog) -> None:
    assert rows(catalog, sql)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    for shard in ("00000", "00001"):
        write_shard(store.directory, folder(), shard, records(1))
    path = tmp_path / folder() / "00001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"trajectories/run=run-0/iter=000000/00001\.parquet is damaged"):
        Catalog(store)


def test_a_missing_column_reads_as_null(tmp_path: Path) -> None:
    """Files of an older minor version stand beside new ones."""
    store = Store.create(str(tmp_path))
    store.publish_table("rewards/reward=a/run=r/iter=000000/0.parquet", rewards({"t0": 1.0}))
    older = table_of([reward_row("t1", 2.0)], REWARDS).drop_columns(["version", "detail"])
    store.publish_table("rewards/reward=a/run=r/iter=000000/1.parquet", older)
    found = rows(Catalog(store), "SELECT trajectory_id, value, version FROM rewards ORDER BY 1")
    assert [tuple(row.values()) for row in found] == [("t0", 1.0, "1"), ("t1", 2.0, None)]


# -- generations ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["store", "a*[store]", "memory"])
def merged(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A filled store of which one iteration is in generations and the other came later."""
    monkeypatch.setattr(compaction, "MANY_FILES", 1)
    place = f"memory://{request.node.name}" if request.param == "memory" else str(tmp_path / request.param)
    store = Store.create(place)
    fill(store, lambda: compaction.compact(store))
    assert len(store.directory.list("catalog/*/gen-000001.json")) == 4
    return store


def test_views_show_generations_and_what_came_after_them(merged: Store, catalog: Catalog) -> None:
    found = Catalog(merged)
    for view in VIEWS - {"policies", "runs", "quarantine"}:  # those tell when they were made
        told = [rows(each, f"SELECT * FROM {view} ORDER BY ALL") for each in (found, catalog)]
        for row in (row for each in told for row in each):
            for attempt in ("latents_file", "media_file"):
                row.pop(attempt, None)
        assert told[0] == told[1], view
    for view in VIEWS:
        types = [rows(each, f"SELECT column_name, column_type FROM (DESCRIBE {view})") for each in (found, catalog)]
        assert types[0] == types[1]
    assert rows(found, LEARNING_CURVE) == rows(catalog, LEARNING_CURVE)
    self_join = "SELECT count(*) AS n FROM trajectories a JOIN trajectories b USING (trajectory_id)"
    assert rows(found, self_join) == [{"n": 5}]


def test_a_generation_is_out_of_reach_of_other_functions(merged: Store) -> None:
    found = Catalog(merged)
    for path in merged.directory.list("catalog/*/*"):
        for function in ("read_parquet", "read_text", "read_blob"):
            with pytest.raises(StoreError, match=r"Permission Error: Cannot access|No files found"):
                found.query(f"SELECT * FROM {function}('{merged.directory.path(path)}')")


def test_damage_in_a_generation_does_not_reach_the_answer(merged: Store, catalog: Catalog) -> None:
    [path] = merged.directory.list("catalog/trajectories/*.parquet")
    data = merged.directory.read(path)
    group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "trajectory_id")
    at = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 3
    found = Catalog(merged)
    overwrite(merged.directory, path, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    names = "SELECT trajectory_id FROM trajectories ORDER BY 1"
    for each in (found, Catalog(merged)):
        with pytest.warns(UserWarning, match=r"gen-000001\.json is passed over \(.*checksum.*\)"):
            assert rows(each, names) == rows(catalog, names)
        assert rows(each, LEARNING_CURVE) == rows(catalog, LEARNING_CURVE)
    overwrite(merged.directory, path, data[:-1])
    with pytest.warns(UserWarning, match="has another size or footer"):
        assert rows(Catalog(merged), names) == rows(catalog, names)


def test_a_damaged_index_of_an_object_store_is_named(tmp_path: Path) -> None:
    store = Store.create("memory://catalog-damaged")
    write_shard(store.directory, folder(), "00000", records(1))
    path = f"{folder()}/00000.parquet"
    overwrite(store.directory, path, store.directory.read(path)[:-1])
    found = Catalog(store)
    assert rows(found, "SELECT * FROM rewards") == []
    with pytest.raises(StoreError, match=rf"{path} is damaged"):
        found.query("SELECT * FROM trajectories")


@pytest.mark.parametrize(
    ("names", "distinct"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a"], ["a", "a_1", "a_2"]),
        (["a", "a", "a_1"], ["a", "a_2", "a_1"]),
        (["a", "a_1", "a", "a_1", "a"], ["a", "a_1", "a_2", "a_1_1", "a_3"]),
    ],
)
def test_no_column_takes_the_name_of_another(names: list[str], distinct: list[str], catalog: Catalog) -> None:
    columns = ", ".join(f"{i} AS {name}" for i, name in enumerate(names))
    assert rows(catalog, f"SELECT {columns}") == [{name: i for i, name in enumerate(distinct)}]


# -- allow_external ------------------------------------------------------------------------------------------------------


def test_other_files_can_be_read_when_that_is_asked_for(filled: Store, tmp_path: Path) -> None:
    found = Catalog(filled, allow_external=True)
    other = tmp_path / "labels.csv"
    other.write_text("trajectory_id,label\ni0-0,good\ni0-1,bad\n")
    labelled = f"SELECT label, value FROM rewards JOIN read_csv('{other}') USING (trajectory_id) ORDER BY 1"
    assert rows(found, labelled) == [{"label": "bad", "value": 0.5}, {"label": "good", "value": 0.25}]
    assert rows(found, LEARNING_CURVE) == rows(Catalog(filled), LEARNING_CURVE)


@pytest.mark.parametrize(
    "sql",
    [
        "COPY prompts TO '{out}'",
        "EXPORT DATABASE '{out}'",
        "ATTACH '{out}'",
        "INSERT INTO prompts VALUES ('p', 't', '{{}}', 'train')",
        "CREATE TABLE mine (i INT)",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET autoinstall_known_extensions = true",
        "CREATE SECRET s (TYPE s3)",
        "PRAGMA enable_profiling='json'",
        "CALL enable_logging(storage = 'file', storage_path = '{out}')",
        "SELECT * FROM enable_logging(storage = 'file', storage_path = '{out}')",
        "SELECT * FROM enable_profiling('json', save_location = '{out}')",
        "SELECT * FROM query('COPY prompts TO ''{out}''')",
        "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('COPY (SELECT 1) TO ''{out}'''))",
        "SELECT * FROM sqlite_attach('{out}')",
        "SELECT * FROM read_duckdb('{out}')",
        "SELECT 1; COPY prompts TO '{out}'",
        "EXPLAIN ANALYZE COPY prompts TO '{out}'",
        "WITH w AS (INSERT INTO prompts VALUES ('p', 't', '{{}}', 'train') RETURNING *) FROM w",
        "WITH w AS (COPY (SELECT 1) TO '{out}') SELECT 1",
        "WITH w AS (COPY (SELECT 1 AS a, 2 AS b) TO '{out}' (FORMAT csv, PARTITION_BY (a), OVERWRITE)) FROM w",
        "(WITH w AS (COPY (SELECT 1) TO '{out}') SELECT 1)",
        "FROM json_execute_serialized_sql(json_serialize_sql('WITH w AS (COPY (SELECT 1) TO ''{out}'') SELECT 1'))",
        "SELECT 1 UNION ALL (WITH w AS (COPY (SELECT 1) TO '{out}') SELECT 1)",
    ],
)
def test_external_access_writes_nothing_either(sql: str, filled: Store, tmp_path: Path) -> None:
    found = Catalog(filled, allow_external=True)
    out = tmp_path / "out"
    before = sorted(map(str, Path(filled.directory.root).rglob("*")))
    with pytest.raises(StoreError):
        found.query(sql.format(out=out))
    assert list(tmp_path.iterdir()) == []
    assert sorted(map(str, Path(filled.directory.root).rglob("*"))) == before


def test_python_objects_are_no_tables_with_external_access_either(filled: Store) -> None:
    secrets = rewards({"t": 1.0})
    assert secrets.num_rows == 1
    with pytest.raises(StoreError, match="Table with name secrets does not exist"):
        Catalog(filled, allow_external=True).query("SELECT * FROM secrets")
