"""Which trajectories an export takes: a SQL condition, one reward, and whatever has to be left out, counted by reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.reward_keys import find_reward, rewards_known
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents, read_media
from opgrpo_data.store import Store

PAGE_ROWS = 20_000
"""Rows of trajectories in memory at a time; an iteration is never divided, so that groups stay whole."""

Row = Mapping[str, Any]

IS_DROPPED = "regexp_replace(latents_file, '([.][^.]*){3}$', '.parquet') IN (SELECT index_file FROM dropped)"
"""SQL of a row of `trajectories`: whether `opgrpo gc` removed its bytes. What `opgrpo_data.store.index_of` is in Python."""

# What `where` is asked of.
_TRAJECTORIES = """
SELECT t.*, p.text, p.metadata, p.split,{value}
    t.trajectory_id IN (SELECT trajectory_id FROM quarantine) AS quarantined,
    {dropped} AS dropped
FROM trajectories t LEFT JOIN prompts p USING (prompt_id){join}
"""
_JOIN = """ LEFT JOIN (
    SELECT trajectory_id, max(value) AS value FROM rewards WHERE reward = {name} AND version = {version} GROUP BY 1
) r USING (trajectory_id)"""


@dataclass(frozen=True)
class Page:
    """Consecutive iterations of one run. trajectories, groups: how many match. size: bytes of their media; largest: of one."""

    run_id: str
    first: int
    last: int
    trajectories: int
    groups: int
    size: int
    largest: int

    @property
    def condition(self) -> str:
        """Its rows, in SQL."""
        return f"run_id = {quoted(self.run_id)} AND iteration BETWEEN {self.first} AND {self.last}"


class Selection:
    """The trajectories of a store that match a condition, page by page.

    reward: `NAME`, `NAME@VERSION`, or None: the only one there is. where: a SQL condition on the columns of `trajectories`, on
    text, metadata and split of the prompt and on `value`, that of the reward; None takes all. Raises StoreError when the
    reward is not there or not the only one, when the condition is no SQL, and when nothing matches.
    """

    def __init__(self, store: Store, reward: str | None, where: str | None, *, needs_reward: bool) -> None:
        self.store = store
        self.where = where
        if where is not None:
            _check_condition(where)
        self.catalog = Catalog(store)
        may_lack = reward is None and not needs_reward and len(rewards_known(self.catalog)) != 1
        self.reward = None if may_lack else find_reward(self.catalog, reward)
        self._matching = f"SELECT * FROM ({self._trajectories()}) WHERE (\n{where or 'true'}\n)"  # noqa: S608 the catalog only reads
        self.pages = self._pages()
        if not self.pages:
            raise StoreError(f"the store {store.directory.url} has no trajectory to export{self._condition()}")

    def _trajectories(self) -> str:
        if self.reward is None:
            return _TRAJECTORIES.format(dropped=IS_DROPPED, value="", join="")
        join = _JOIN.format(name=quoted(self.reward.name), version=quoted(self.reward.version))
        return _TRAJECTORIES.format(dropped=IS_DROPPED, value=" r.value,", join=join)

    def _condition(self) -> str:
        return "" if self.where is None else f" for which {self.where}"

    def _pages(self) -> list[Page]:
        counted = (
            "run_id, iteration, count(DISTINCT trajectory_id) AS trajectories, count(DISTINCT group_id) AS groups, "
            "sum(media_length)::BIGINT AS size, max(media_length) AS largest"
        )
        try:
            rows = self.ask(counted, "GROUP BY ALL ORDER BY ALL")
        except StoreError as error:
            if self.where is None:
                raise
            known = ", ".join(map(str, rewards_known(self.catalog)))
            several = f"; the column value needs a reward, name one of {known}" if self.reward is None and known else ""
            raise StoreError(f"the condition {self.where!r} cannot be asked: {error}{several}") from error
        pages: list[Page] = []
        for row in rows:
            counts = (row[name] or 0 for name in ("trajectories", "groups", "size", "largest"))
            page = Page(row["run_id"], row["iteration"], row["iteration"], *counts)
            joined = pages[-1] if pages else page
            if joined is not page and joined.run_id == page.run_id and joined.trajectories + page.trajectories <= PAGE_ROWS:
                pages[-1] = _joined(joined, page)
            else:
                pages.append(page)
        return pages

    def rows(self, page: Page) -> list[dict[str, Any]]:
        """The matching rows of a page, in the order of their bytes: columns of trajectories, text, metadata, split, value,
        quarantined, dropped. Raises StoreError when the condition does not give the same answer twice."""
        asked = self.ask("*", f"WHERE {page.condition} ORDER BY latents_file, latents_offset")
        # An id that two shards hold (two imports at once) counts once.
        rows = list({row["trajectory_id"]: row for row in reversed(asked)}.values())[::-1]
        if len(rows) != page.trajectories:
            raise StoreError(
                f"the condition {self.where!r} gave {page.trajectories} trajectories and then {len(rows)}: ask for something "
                f"that stays the same, for example hash(trajectory_id) % 10 = 0"
            )
        return [row if self.reward is not None else row | {"value": None} for row in rows]

    def present(self, rows: Sequence[dict[str, Any]], left_out: LeftOut) -> Iterator[dict[str, Any]]:
        """The rows whose bytes may be used; the others are counted."""
        for row in rows:
            if row["quarantined"] or row["dropped"]:
                left_out.add("quarantined" if row["quarantined"] else "dropped")
            else:
                yield row

    def rewards(self, page: Page) -> dict[str, list[dict[str, Any]]]:
        """All that rewards said of the trajectories of a page, by trajectory_id."""
        told: dict[str, list[dict[str, Any]]] = {}
        for view in ("rewards", "reward_errors"):
            mine = f"SELECT trajectory_id FROM trajectories WHERE {page.condition}"  # noqa: S608 quoted
            for row in self.catalog.query(f"FROM {view} WHERE trajectory_id IN ({mine}) ORDER BY ALL").to_pylist():
                told.setdefault(row["trajectory_id"], []).append(row)
        return told

    def ask(self, columns: str, rest: str = "") -> list[dict[str, Any]]:
        """Something about all matching trajectories: SELECT columns FROM them, and the rest of the query."""
        found: list[dict[str, Any]] = self.catalog.query(f"SELECT {columns} FROM ({self._matching}) {rest}").to_pylist()  # noqa: S608 the catalog only reads
        return found

    def media(self, row: Row, left_out: LeftOut) -> bytes | None:
        """The media of a row, verified; None, and counted, where it is damaged."""
        try:
            if row["media_length"] is None:
                raise StoreError(f"the index row of {row['trajectory_id']} has no media")
            return read_media(self.store.directory, row)
        except (CorruptionError, StoreError) as error:
            left_out.add("damaged", str(error))
            return None

    def latents(self, row: Row, left_out: LeftOut) -> Any:
        """All latents of a row, (T+1, *latent_shape), verified; None, and counted, where they are damaged."""
        try:
            location = LatentLocation.of(row)
            return read_latents(self.store.directory, location, 0, len(location.checksums) - 1)
        except (CorruptionError, StoreError) as error:
            left_out.add("damaged", str(error))
            return None


def _joined(one: Page, other: Page) -> Page:
    return Page(
        one.run_id,
        one.first,
        other.last,
        one.trajectories + other.trajectories,
        one.groups + other.groups,
        one.size + other.size,
        max(one.largest, other.largest),
    )


def _check_condition(where: str) -> None:
    """Raise StoreError unless the text is one condition: `false) UNION ALL (...` would be a query of its own."""
    if not where.strip():
        raise StoreError("the condition is empty: give one, or leave --where away")
    try:
        duckdb.extract_statements(f"SELECT CASE WHEN (\n{where}\n) THEN 1 END")
    except duckdb.Error as error:
        raise StoreError(f"the condition {where!r} cannot be asked: {' '.join(str(error).split())}") from error


def quoted(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"
