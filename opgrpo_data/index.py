"""A narrow table in memory of all scored trajectories of a store, for selections over millions of them.

One row a trajectory: where it comes from, and its value of one reward. It is read once, through the generations as far as they
go (opgrpo_data.generations), and then follows the store: `poll` takes in what was committed since.

Memory: about 65 bytes a trajectory (10 million: 0.65 GB), and while reading one row group of a generation. Trajectories that
have no value yet wait in a table of the same kind; a poll goes through all that wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from opgrpo_data.buffer import QUERIES
from opgrpo_data.io import checked_name
from opgrpo_data.pieces import BATCH_ROWS, Piece, read_pieces
from opgrpo_data.store import Store
from opgrpo_data.watch import Watch

MANY_MEMBERS = 1000
"""From so many members on, keeping the best of each prompt costs more than it spares."""

TRAJECTORY_COLUMNS = ("trajectory_id", "prompt_id", "run_id", "iteration", "member_index", "prefix_steps")
REWARD_COLUMNS = ("trajectory_id", "reward", "version", "value", "error")

# An id of 24 hexadecimal digits is kept as its 12 bytes, any other as its text, which is made longer where it is 12 bytes.
_PACKED = """CASE WHEN regexp_full_match(trajectory_id, '[0-9a-f]{24}') THEN unhex(trajectory_id)
    WHEN octet_length(encode(trajectory_id)) = 12 THEN encode(trajectory_id || '/') ELSE encode(trajectory_id) END"""
_TEXT = "CASE WHEN octet_length(id) = 12 THEN lower(hex(id)) ELSE rtrim(decode(id), '/') END"
_COLUMNS = "id BLOB, prompt INTEGER, run INTEGER, file INTEGER, iteration BIGINT, member INTEGER, prefix INTEGER"


class Index:
    """The scored trajectories of a store, for one version of one reward.

    A trajectory is in it once its value is committed and finite. Those in quarantine or in dropped shards (as of the last
    poll) are left out of what `best` returns. For filters of one's own, ask `best` for more members than groups have: that is
    all of them. To go on to latents, read whole rows out of the index files of what was chosen:
    `store.read_tables("trajectories", sorted(set(chosen["index_file"].to_pylist())))`.
    """

    def __init__(self, store: Store, *, reward: str, version: str) -> None:
        """Read the store. Raises StoreError when an index is damaged."""
        self._store = store
        self._reward, self._version = checked_name(reward, "reward"), version
        self._watches = {"trajectories": Watch(store, "trajectories"), "rewards": Watch(store, "rewards", reward)}
        self._prompts, self._runs, self._files = _Codes(), _Codes(), _Codes()
        self._connection = duckdb.connect(":memory:", config={"enable_external_access": "false"})
        self._connection.execute(f"CREATE TABLE waiting ({_COLUMNS})")  # no value yet
        self._connection.execute("CREATE TABLE unmatched (id BLOB, value DOUBLE)")  # no trajectory yet
        self._connection.execute(f"CREATE TABLE scored ({_COLUMNS}, value DOUBLE)")
        self._sizes = {"waiting": 0, "unmatched": 0}
        self._poll(first=True)

    def __len__(self) -> int:
        """Scored trajectories, those in quarantine or dropped included."""
        return self._count("scored")

    def poll(self) -> int:
        """Take in what was committed since the last poll; returns how many index files that was.

        Raises StoreError when one is damaged; then none of them is taken in.
        """
        return self._poll(first=False)

    def best(
        self,
        members: int = 1,
        *,
        iteration: int = 0,
        decay: float = 1.0,
        decay_form: Literal["multiplicative", "linear"] = "multiplicative",
    ) -> pa.Table:
        """Of each prompt the `members` trajectories of highest decayed reward, or as many as there are.

        The reward of a trajectory drawn in iteration i decays by the age `iteration` - i, as in BufferRule. Of equals the newer
        comes first, then the lower member_index, then the id. Columns: trajectory_id, prompt_id, run_id, iteration,
        member_index, prefix_steps, value, decayed_reward, index_file; ordered by prompt_id, best first.
        """
        if members < 1:
            raise ValueError(f"members is {members}: choose at least 1")
        if decay_form not in ("multiplicative", "linear"):
            raise ValueError(f"decay_form is {decay_form!r}: choose multiplicative or linear")
        query = QUERIES.joinpath("index_best.sql").read_text().format(usable=self._usable(), least=_least(members))
        parameters = {"iteration": iteration, "decay": decay, "decay_form": decay_form, "members": members}
        decoded = f"SELECT {_TEXT} AS trajectory_id, * FROM ({query})"  # noqa: S608 our own
        found = self._connection.sql(decoded, params=parameters).to_arrow_table()
        columns = {
            "trajectory_id": found["trajectory_id"],
            "prompt_id": self._prompts.texts(found["prompt"]),
            "run_id": self._runs.texts(found["run"]),
            "iteration": found["iteration"],
            "member_index": found["member"],
            "prefix_steps": found["prefix"],
            "value": found["value"],
            "decayed_reward": found["decayed"],
            "index_file": self._files.texts(found["file"]),
        }
        order = ("prompt_id", "decayed_reward", "iteration", "member_index", "trajectory_id")
        falling = ("decayed_reward", "iteration")
        return pa.table(columns).sort_by([(name, "descending" if name in falling else "ascending") for name in order])

    # -- taking in --------------------------------------------------------------------------------------------------

    def _poll(self, *, first: bool) -> int:
        pending = {kind: watch.pending() for kind, watch in self._watches.items()}
        if first:  # nothing to return to; and a transaction would keep all that is dropped on the way
            self._ingest(pending)
        elif any(pending.values()):
            self._connection.begin()
            try:
                self._ingest(pending)
                self._connection.commit()
            except BaseException:
                self._connection.rollback()
                self._sizes = {table: self._count(table) for table in self._sizes}
                raise
        for kind, paths in pending.items():
            self._watches[kind].take(paths)
        self._exclude()
        return sum(map(len, pending.values()))

    def _ingest(self, pending: dict[str, list[str]]) -> None:
        """Trajectories and rewards side by side: both lie in the order of their shards, so that few have to wait."""
        drawn = read_pieces(self._store, "trajectories", TRAJECTORY_COLUMNS, pending["trajectories"])
        judged = read_pieces(self._store, "rewards", REWARD_COLUMNS, pending["rewards"])
        for trajectories, rewards in zip_longest(drawn, judged):
            if trajectories is not None:
                self._add_trajectories(*trajectories)
            if rewards is not None:
                self._add_rewards(rewards)
            # A table of many that wait is not gone through for a few.
            if self._sizes["unmatched"] >= max(BATCH_ROWS, self._sizes["waiting"] // 4):
                self._match()
        self._match()

    def _add_trajectories(self, segments: Iterable[tuple[str, int]], table: pa.Table) -> None:
        paths, counts = zip(*segments, strict=True)
        coded = {
            "prompt": self._prompts.encode(table["prompt_id"]),
            "run": self._runs.encode(table["run_id"]),
            "file": np.repeat(self._files.encode(pa.chunked_array([paths], pa.string())), counts),
        }
        for name, codes in coded.items():
            table = table.append_column(name, pa.array(codes))
        self._insert(
            "waiting", f"{_PACKED}, prompt, run, file, iteration, member_index, coalesce(prefix_steps, 0)", table, "true"
        )

    def _add_rewards(self, piece: Piece) -> None:
        table = piece[1]
        mine = pc.and_(pc.equal(table["reward"], self._reward), pc.equal(table["version"], self._version))
        self._insert("unmatched", f"{_PACKED}, value", table.filter(mine), "error IS NULL AND isfinite(value)")

    def _insert(self, into: str, columns: str, table: pa.Table, condition: str) -> None:
        self._connection.register("arriving", table)
        self._sizes[into] += self._run(
            f"INSERT INTO {into} SELECT {columns} FROM arriving WHERE trajectory_id IS NOT NULL AND {condition}"  # noqa: S608 our own
        )
        self._connection.unregister("arriving")

    def _match(self) -> None:
        """Move trajectories whose values are there. Of several values or rows of one id, which are the same, one."""
        found = "SELECT DISTINCT ON (id) * FROM waiting JOIN unmatched USING (id)"
        if not (matched := self._run(f"CREATE OR REPLACE TEMP TABLE matched AS {found}")):
            return
        # Copies of a row have its iteration. Told as numbers, they spare most of the table the search.
        [ends] = self._connection.execute(
            "SELECT coalesce(min(iteration), 0), coalesce(max(iteration), 0) FROM matched"
        ).fetchall()
        copies = f"SELECT id FROM scored WHERE iteration BETWEEN {ends[0]:d} AND {ends[1]:d} AND id IN (SELECT id FROM matched)"  # noqa: S608 our own
        self._run(f"INSERT INTO scored FROM matched WHERE id NOT IN ({copies})")
        for table, size in self._sizes.items():
            if matched * 2 > size:  # deleted rows would keep their memory
                rest = f"SELECT * FROM {table} WHERE id NOT IN (SELECT id FROM matched)"  # noqa: S608 our own
                self._sizes[table] = self._run(f"CREATE OR REPLACE TABLE {table} AS {rest}")
            else:
                self._sizes[table] -= self._run(f"DELETE FROM {table} WHERE id IN (SELECT id FROM matched)")  # noqa: S608 our own

    def _run(self, statement: str) -> int:
        """Execute a statement that returns one number: of rows counted, written or deleted."""
        [(count,)] = self._connection.execute(statement).fetchall()
        return int(count)

    def _count(self, table: str) -> int:
        return self._run(f"SELECT count(*) FROM {table}")  # noqa: S608 our own

    # -- leaving out ------------------------------------------------------------------------------------------------

    def _exclude(self) -> None:
        """Learn anew what is in quarantine or dropped: a dropped shard may be taken back."""
        self._quarantined = pa.table({"trajectory_id": pa.array(sorted(self._store.quarantined()), pa.string())})
        shards = pa.chunked_array([sorted(self._store.dropped_shards())], pa.string())
        self._dropped = pa.table({"file": pa.array(self._files.encode(shards))})

    def _usable(self) -> str:
        conditions = []
        if self._quarantined.num_rows:
            self._connection.register("quarantined", self._quarantined)
            conditions.append(f"id NOT IN (SELECT {_PACKED} FROM quarantined)")  # noqa: S608 our own
        if self._dropped.num_rows:
            self._connection.register("dropped", self._dropped)
            conditions.append("file NOT IN (SELECT file FROM dropped)")
        return f"WHERE {' AND '.join(conditions)}" if conditions else ""


def _least(members: int) -> str:
    """SQL for the least decayed reward of a prompt that may be among its best."""
    if members > MANY_MEMBERS:
        return "min(decayed)"
    return "max(decayed)" if members == 1 else f"list_min(max(decayed, {members}))"


class _Codes:
    """Texts that repeat, as numbers 0, 1, ... in the order of their first appearance."""

    def __init__(self) -> None:
        self._codes: dict[str | None, int] = {}

    def encode(self, texts: pa.ChunkedArray) -> NDArray[np.int32]:
        """(n,) int32: a number for each text."""
        encoded = texts.combine_chunks().dictionary_encode(null_encoding="encode")
        known = [self._codes.setdefault(text, len(self._codes)) for text in encoded.dictionary.to_pylist()]
        codes: NDArray[np.int32] = np.array(known, np.int32)[encoded.indices.to_numpy(zero_copy_only=False)]
        return codes

    def texts(self, codes: pa.ChunkedArray) -> pa.Array:
        """The texts behind numbers."""
        return pa.array(self._codes, pa.string()).take(codes.combine_chunks())
