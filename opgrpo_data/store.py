"""A store: one directory or bucket prefix of immutable files. Creates and opens it, names its files, publishes tables.

Everything a stage decides is a Parquet table or a JSON document published here under a name that says what it is about.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from opgrpo_data import ids, schema
from opgrpo_data.bounds import read_bounded
from opgrpo_data.documents import document_problem
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.io import Directory, checked_name
from opgrpo_data.seal import check_seal, read_json, sealed_json

MARKER = "store.json"


@dataclass(frozen=True)
class TableKind:
    """A table of the store: the glob that finds its files, and their schema."""

    pattern: str
    schema: pa.Schema


TABLES: Mapping[str, TableKind] = {
    "prompts": TableKind("prompts/*.parquet", schema.PROMPTS),
    "trajectories": TableKind("trajectories/run=*/iter=*/*.parquet", schema.TRAJECTORIES),
    "rewards": TableKind("rewards/reward=*/run=*/iter=*/*.parquet", schema.REWARDS),
    "buffers": TableKind("buffers/run=*/iter=*.parquet", schema.BUFFERS),
    "plans": TableKind("plans/run=*/iter=*.parquet", schema.PLANS),
    "densities": TableKind("densities/run=*/iter=*.parquet", schema.DENSITIES),
    "updates": TableKind("updates/run=*/iter=*.parquet", schema.UPDATES),
    "evals": TableKind("evals/run=*/iter=*/*.parquet", schema.EVALS),
    "quarantine": TableKind("quarantine/*.parquet", schema.QUARANTINE),
    "dropped": TableKind("dropped/run=*/iter=*/*.parquet", schema.DROPPED),
}


# What a user can do about a damaged file besides restoring it.
REMADE = {
    "rewards": ", or remove it and run `opgrpo score` again",
    "buffers": ", or remove it and run `opgrpo select` for that iteration again",
    "plans": ", or remove it and run `opgrpo select` for that iteration again",
    "densities": ", or remove it and run `opgrpo rollout` for that iteration again",
}


class Store:
    """An opened store. Build it with `Store.create` or `Store.open`."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory

    @classmethod
    def create(cls, url: str) -> Store:
        """Open the store at `url`, making it first if nothing is there. Raises StoreError if something else is."""
        directory = Directory(url)
        if not directory.exists(MARKER):
            if directory.list("*") and not directory.exists(MARKER):  # or another process has just made it
                raise StoreError(f"{url} is not empty and not an opgrpo store: choose another directory")
            document = {"format": schema.FORMAT, "version": schema.SCHEMA_VERSION, "created_at": now().isoformat()}
            try:
                directory.publish(MARKER, sealed_json(document))
            except OSError as error:
                raise StoreError(f"cannot make a store at {url}: {error}; choose another directory") from error
        return cls.open(url)

    @classmethod
    def open(cls, url: str) -> Store:
        """Open an existing store. Raises StoreError when there is none, or its format is newer than this software."""
        directory = Directory(url)
        schema.check_version(_marker(directory, url), url)
        return cls(directory)

    @property
    def version(self) -> str:
        """The format version that its store.json says."""
        return str(_marker(self.directory, self.directory.url)["version"])

    def read(self, path: str) -> bytes:
        """The bytes of a file that a listing names. Raises StoreError where it is none: a folder, a pipe, a link to nowhere."""
        try:
            return self.directory.read(path)
        except FileNotFoundError as error:
            raise StoreError(
                f"{path} cannot be read ({error.strerror or 'no such file'}): restore it from a copy, or remove it; "
                f"`opgrpo verify` finds all such files"
            ) from error

    # -- tables -----------------------------------------------------------------------------------------------------

    def publish_table(self, path: str, table: pa.Table) -> bool:
        """Publish a table as Parquet unless the name is taken. True if this call created it."""
        return self.directory.publish(path, schema.to_parquet(table))

    def read_tables(self, kind: str, paths: Sequence[str]) -> pa.Table:
        """The rows of several files of one kind, in the order of `paths`; columns exactly as in its schema."""
        tables = [self.parse(kind, path, self.read(path)) for path in paths]
        return pa.concat_tables(tables) if tables else TABLES[kind].schema.empty_table()

    def parse(self, kind: str, path: str, data: bytes) -> pa.Table:
        """The table in a file of one kind. Raises StoreError, which names `path`, when the bytes are damaged."""
        wanted = TABLES[kind].schema
        try:
            check_seal(data)
            return schema.conform(read_bounded(data, wanted.names), wanted)
        except (pa.ArrowException, OSError, ValueError) as error:  # depending on which byte is damaged
            said, remade = " ".join(str(error).split()), REMADE.get(path.split("/")[0], "")
            raise StoreError(f"{path} is damaged ({said}): restore it from a copy{remade}") from error

    def files(self, kind: str, *, run: str = "*", iteration: int | None = None, reward: str = "*") -> list[str]:
        """Files of one kind of table, sorted; optionally only of one run, iteration or reward."""
        pattern = TABLES[kind].pattern.replace("reward=*", f"reward={reward}").replace("run=*", f"run={run}")
        if iteration is not None:
            pattern = pattern.replace("iter=*", f"iter={iteration:06d}")
        return self.directory.list(pattern)

    # -- prompts ----------------------------------------------------------------------------------------------------

    def add_prompts(self, prompts: Sequence[Mapping[str, Any]], split: str) -> str:
        """Publish prompts (`text`, `metadata`) of a split as one file named by its content, unless it is there.

        Returns its path: a run keeps it, and with it its prompts in their order.
        """
        rows = [
            {
                "prompt_id": ids.prompt_id(prompt["text"], prompt["metadata"]),
                "text": prompt["text"],
                "metadata": ids.canonical_json(prompt["metadata"]),
                "split": split,
            }
            for prompt in prompts
        ]
        path = prompts_path(rows, split)
        self.publish_table(path, schema.table_of(rows, schema.PROMPTS))
        return path

    # -- documents --------------------------------------------------------------------------------------------------

    def add_run(self, run_id: str, document: Mapping[str, Any]) -> bool:
        """Register a run: its resolved config, command line and software. False: it was registered before."""
        body = {"run_id": run_id, **document, "created_at": now().isoformat()}
        return self.directory.publish(f"runs/{checked_name(run_id, 'run_id')}.json", sealed_json(body, indent=1))

    def add_policy(self, policy_id: str, document: Mapping[str, Any], weights: bytes | None) -> bool:
        """Register a policy; its weights (safetensors), when kept, go first and policy.json, the commit, last."""
        path = weights_path(policy_id)
        if weights is not None and not self.directory.exists(path):
            with self.directory.write_atomic(path) as file:
                file.write(weights)
        body = {"policy_id": policy_id, **document, "created_at": now().isoformat()}
        return self.directory.publish(f"policies/{policy_id}/policy.json", sealed_json(body, indent=1))

    def documents(self, pattern: str) -> Iterator[dict[str, Any]]:
        """The JSON documents whose paths match a glob, in the order of their names."""
        for path in self.directory.list(pattern):
            document = _document(self.read(path), path)
            if problem := document_problem(path, document):
                raise StoreError(f"{path} {problem}: the store was damaged, restore it from a copy")
            yield document

    # -- quarantine -------------------------------------------------------------------------------------------------

    def quarantine(self, trajectory_id: str, error: CorruptionError) -> None:
        """Record that a trajectory's bytes are damaged, and how. From then on no buffer and no plan takes it."""
        row = {
            "trajectory_id": trajectory_id,
            "file": error.file,
            "member": error.member,
            "reason": error.reason,
            "expected_crc32": error.expected,
            "found_crc32": error.found,
            "noticed_at": now(),
        }
        name = checked_name(trajectory_id, "trajectory_id")
        self.publish_table(f"quarantine/{name}.parquet", schema.table_of([row], schema.QUARANTINE))

    def quarantined(self) -> set[str]:
        """Ids of all trajectories in quarantine."""
        return {path.removeprefix("quarantine/").removesuffix(".parquet") for path in self.files("quarantine")}

    # -- dropped shards ---------------------------------------------------------------------------------------------

    def dropped_shards(self) -> set[str]:
        """Index files of the shards whose tars `opgrpo gc` removed: their rows stay, their latents and media do not."""
        return {f"trajectories/{path.removeprefix('dropped/')}" for path in self.files("dropped")}

    def outside(self, to: str) -> Directory:
        """A place to write to. Raises StoreError when it lies in the store, where it would be taken for a part of it."""
        directory = Directory(to)
        if self.directory.contains(directory):
            raise StoreError(f"{to} lies in the store {self.directory.url}: choose a place outside it")
        return directory

    def unusable(self, rows: Iterable[Mapping[str, Any]]) -> set[str]:
        """Ids of all trajectories in quarantine, and of those among `rows` (trajectory_id, latents_file) in dropped shards.

        No buffer and no plan may take them.
        """
        shards = self.dropped_shards()
        dropped = {row["trajectory_id"] for row in rows if shards and index_of(row["latents_file"]) in shards}
        return self.quarantined() | dropped

    # -- pins -------------------------------------------------------------------------------------------------------

    def pin(self, run_id: str) -> None:
        """Keep what a run drew, and what its buffers and plans use, from `opgrpo gc`. Raises StoreError for no such run."""
        self._check_run(run_id)
        self.directory.publish(f"pins/{run_id}.json", sealed_json({"run_id": run_id, "pinned_at": now().isoformat()}))

    def unpin(self, run_id: str) -> None:
        """Take a run's pin away, if it has one. Raises StoreError for no such run."""
        self._check_run(run_id)
        self.directory.remove(f"pins/{run_id}.json")

    def pins(self) -> set[str]:
        """Pinned runs."""
        return {path.removeprefix("pins/").removesuffix(".json") for path in self.directory.list("pins/*.json")}

    def _check_run(self, run_id: str) -> None:
        if not self.directory.exists(f"runs/{checked_name(run_id, 'run_id')}.json"):
            known = [path.removeprefix("runs/").removesuffix(".json") for path in self.directory.list("runs/*.json")]
            raise StoreError(f"the store {self.directory.url} has no run {run_id}; it has {known}")


def require_current(store: Store, what: str) -> None:
    """Raise StoreError in a store of an older version: `what` would write there what the software of that version misreads."""
    if (version := store.version) != schema.SCHEMA_VERSION:
        raise StoreError(
            f"{store.directory.url} has format version {version}, and {what} needs {schema.SCHEMA_VERSION}: "
            f"run `opgrpo migrate --store {shlex.quote(store.directory.url)}` first"
        )


def weights_path(policy_id: str) -> str:
    """Where the weights of a policy lie, if they are kept."""
    return f"policies/{checked_name(policy_id, 'policy_id')}/weights.safetensors"


def prompts_path(rows: Sequence[Mapping[str, Any]], split: str) -> str:
    """Where the prompts of a split lie: named by their ids, in their order."""
    return f"prompts/{checked_name(split, 'split')}-{ids.derived_seed(*(row['prompt_id'] for row in rows)):016x}.parquet"


def index_of(tar: str) -> str:
    """The index file of a shard, by the name of one of its tars: <shard>.<attempt>.<latents or media>.tar."""
    return f"{tar.rsplit('.', 3)[0]}.parquet"


def iteration_folder(kind: str, run_id: str, iteration: int) -> str:
    """`<kind>/run=<run>/iter=<000012>`: where one iteration of one run keeps its files of one kind."""
    return f"{kind}/run={checked_name(run_id, 'run_id')}/iter={iteration:06d}"


def now() -> datetime:
    """The present moment, in UTC, as tables store it."""
    return datetime.now(UTC)


def _marker(directory: Directory, url: str) -> dict[str, Any]:
    try:
        return _document(directory.read(MARKER), f"{url}/{MARKER}")
    except FileNotFoundError as error:
        raise StoreError(f"no store at {url}: make one with `opgrpo init --store {shlex.quote(url)} CONFIG`") from error
    except NotADirectoryError as error:
        raise StoreError(
            f"no store at {url}: it is a file, or lies in one, and a store is a folder or a bucket prefix"
        ) from error


def _document(data: bytes, named: str) -> dict[str, Any]:
    try:
        return read_json(data)
    except ValueError as error:
        raise StoreError(f"{named} {error}: the store was damaged, restore it from a copy") from error
