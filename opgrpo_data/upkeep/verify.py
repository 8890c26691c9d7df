"""Is everything in a store as it was written? Fast: indexes, documents, sizes, references. Deep: every byte.

Either way tables and documents are read whole, held against their seals (opgrpo_data.seal), and against each other
(opgrpo_data.upkeep.agreement).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from opgrpo_data import generations, seal, tensors
from opgrpo_data.checksum import crc32
from opgrpo_data.documents import DOCUMENT_KEYS, document_problem
from opgrpo_data.errors import StoreError
from opgrpo_data.generations import Generation
from opgrpo_data.store import MARKER, TABLES, Store, index_of, weights_path
from opgrpo_data.upkeep.agreement import Agreement, place_problem
from opgrpo_data.upkeep.shard_checks import UNREADABLE, Damage, Shard

SEALED_SINCE = (1, 2)
DOCUMENTS = {kind: f"{kind}/*/policy.json" if kind == "policies" else f"{kind}/*.json" for kind in DOCUMENT_KEYS}
UNSEALED_FILES = "migrations/*.json"
"""What `opgrpo migrate` wrote down: the crc32 of each table and document that older software had left without a seal."""
RESTORE = "restore it from a copy"
NO_FILE = "remove it, and restore what should be there from a copy"
NO_COPY = "restore it from a copy, or run `opgrpo verify --deep --quarantine`: training then does without what is damaged"

Kind = Literal["damage", "disagreement"]
Bar = Callable[[Sequence[str], str], Iterable[str]]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written. member: of a tar, or a row of a table. remedy: what to do.

    kind: a file is damaged, or files do not agree with each other, each of which may be whole.
    """

    path: str
    member: str | None
    problem: str
    remedy: str
    kind: Kind


@dataclass
class Report:
    """What was looked at, and what is wrong.

    files: tables, documents and tensor files read, tars looked at. trajectories: rows of all indexes. bytes: read and checked.
    quarantined: trajectories in quarantine whose known damage is no finding any more. unsealed: tables and documents of a store
    of an older version that nothing covers but Parquet's own checksums: `opgrpo migrate` writes theirs down.
    """

    deep: bool
    files: int = 0
    trajectories: int = 0
    bytes: int = 0
    quarantined: int = 0
    unsealed: int = 0
    findings: list[Finding] = field(default_factory=list)


def verify(store: Store, *, deep: bool, quarantine: bool = False, bar: Bar = lambda tasks, _: tasks) -> Report:
    """Look at everything, changing nothing; with `quarantine`, put the trajectories in quarantine whose bytes are damaged.

    bar: shows progress over files. Raises StoreError only where the place itself cannot be read.
    """
    return _Verification(store, deep, quarantine, bar).run()


class _Verification:
    """One look at a store, and what it has come to."""

    def __init__(self, store: Store, deep: bool, quarantine: bool, bar: Bar) -> None:
        self.store = store
        self.quarantine = quarantine
        self.bar = bar
        self.report = Report(deep)
        settled = store.directory.entries()
        self.files = {kind: store.files(kind) for kind in TABLES}
        self.documents = {kind: store.directory.list(pattern) for kind, pattern in DOCUMENTS.items()}
        self.sizes = {entry.path: entry.size for entry in (*settled, *store.directory.entries())}
        self.known = store.quarantined()
        self.forgiven: set[str] = set()
        self.must_be_sealed = tuple(map(int, store.version.split("."))) >= SEALED_SINCE
        self.unsealed: dict[str, str] = {}
        listed = (path for paths in self.files.values() for path in paths)  # also what is no file
        self.agreement = Agreement({*self.sizes, *listed}, (entry.path for entry in settled))
        self.rows: dict[str, int] = {}

    def run(self) -> Report:
        for path in (MARKER, *self.store.directory.list(UNSEALED_FILES)):
            if (document := self._document(path)) is not None and path != MARKER:
                if not isinstance(unsealed := document.get("unsealed"), dict):
                    self._find(path, "it lists no files")
                    continue
                self.unsealed |= unsealed
                for gone in sorted(unsealed.keys() - self.sizes.keys()):
                    if not gone.startswith("quarantine/"):  # people take trajectories out of it again
                        self._find(gone, f"it is gone: {path} lists it")
        for kind, paths in self.documents.items():
            for path in paths:
                self._described(kind, path)
        self._shards()
        self._tables()
        for found in self.agreement.disagreements():
            self._find(found.path, found.problem, found.remedy, kind="disagreement")
        self._generations()
        held = (path for path in self.sizes if path.endswith(".safetensors"))
        for path in self.bar(list(held), "tensors"):
            self._tensors(path)
        self.report.quarantined = len(self.forgiven)
        self.report.findings = [each for each in self.report.findings if not self._removed_since(each.path)]
        return self.report

    def _removed_since(self, path: str) -> bool:
        """Whether a file went, as it may, since we listed it: states a run needs no more, tars that `gc` drops, leftovers."""
        if path not in self.sizes or self.store.directory.list(path):
            return False
        if path.endswith(".tar"):
            return index_of(path) in self.store.dropped_shards()
        return path.endswith(".safetensors") or path.startswith("catalog/")

    def _find(self, path: str, problem: str, remedy: str = RESTORE, member: str | None = None, kind: Kind = "damage") -> None:
        self.report.findings.append(Finding(path, member, problem, remedy, kind))

    # -- files ------------------------------------------------------------------------------------------------------

    def _read(self, path: str) -> bytes | None:
        """A file; None, and a finding, where it is none: a folder, a pipe, a link that leads nowhere, a file without rights."""
        self.report.files += 1
        try:
            data = self.store.directory.read(path)
        except (*UNREADABLE, StoreError) as error:
            self._find(path, f"it cannot be read: {getattr(error, 'strerror', None) or error}", NO_FILE)
            return None
        self.report.bytes += len(data)
        return data

    def _document(self, path: str) -> dict[str, Any] | None:
        """A JSON document; None, and a finding, when it is damaged."""
        if (data := self._read(path)) is None:
            return None
        try:
            document = seal.read_json(data)
        except ValueError as error:
            self._find(path, f"it {error}")
            return None
        self._covered(path, data)
        return document

    def _covered(self, path: str, data: bytes) -> None:
        """A finding, where a file that was read without complaint has lost its seal."""
        if seal.check_seal(data):
            return
        if not self.must_be_sealed:
            self.report.unsealed += 1
        elif path not in self.unsealed:
            self._find(path, "it has no seal, which every file of this format version has")
        elif self.unsealed[path] != (found := f"{crc32(data):08x}"):
            self._find(
                path, f"it has changed since the store was migrated: expected crc32 {self.unsealed[path]}, found {found}"
            )

    def _described(self, kind: str, path: str) -> None:
        document = self._document(path)
        if document is None:
            return
        if problem := document_problem(path, document):
            self._find(path, f"it {problem}")
            return
        if kind == "runs":
            self.agreement.add_run(document)
        for needed in _needed(kind, document):
            if needed not in self.sizes:
                self._find(path, f"it speaks of {needed}, which is not there")

    def _table(self, kind: str, path: str) -> tuple[pa.Table, bool] | None:
        """A table, and whether it is sealed; None, and a finding, when it is damaged."""
        if (data := self._read(path)) is None:
            return None
        try:
            table = self.store.parse(kind, path, data)
        except StoreError as error:
            problem, _, remedy = str(error).removeprefix(f"{path} ").rpartition(": ")
            self._find(path, f"it {problem}", remedy)
            return None
        self._covered(path, data)
        self.rows[path] = table.num_rows
        if misplaced := place_problem(path, table):
            self._find(path, f"it {misplaced}")
        self.agreement.add_table(kind, path, table)
        return table, seal.check_seal(data)

    def _tensors(self, path: str) -> None:
        self.report.files += 1
        try:
            header = tensors.read_header(self.store.directory, path)
            if header.size != self.sizes.get(path, header.size):
                raise ValueError(f"it has {self.sizes[path]} bytes, its header tells {header.size}")
            if header.path not in ("", path):
                raise ValueError(f"it is another file, that of {header.path[:200]}")
            if self.report.deep:
                tensors.check_bytes(self.store.directory, path, header)
                self.report.bytes += header.size
        except ValueError as error:
            again = ", or remove it, and its prompts are encoded again" if path.startswith("conditions/") else ""
            self._find(path, f"it is damaged: {error}", f"{RESTORE}{again}")
        except UNREADABLE as error:
            self._find(path, f"it cannot be read: {error.strerror or error}", NO_FILE)

    # -- trajectories -----------------------------------------------------------------------------------------------

    def _shards(self) -> None:
        dropped = self.store.dropped_shards()
        for path in self.bar(self.files["trajectories"], "shards"):
            if (read := self._table("trajectories", path)) is None:
                continue
            table, is_sealed = read
            self.report.trajectories += table.num_rows
            shard = Shard(self.store.directory, path, table, self.sizes, is_sealed)
            self._damages(shard.check_rows())
            if path in dropped:
                continue
            self._damages(shard.check_sizes())
            self.report.files += len(shard.files())
            if self.report.deep:
                self._damages(shard.check_bytes())
                self.report.bytes += sum(self.sizes.get(file, 0) for file in shard.files())

    def _damages(self, damages: Iterator[Damage]) -> None:
        for damage in damages:
            if damage.errors and damage.errors.keys() <= self.known:
                self.forgiven |= damage.errors.keys()
                continue
            self._find(damage.path, damage.problem, NO_COPY if damage.errors else RESTORE, damage.member)
            for trajectory_id, error in damage.errors.items() if self.quarantine else ():
                self.store.quarantine(trajectory_id, error)

    # -- other tables -----------------------------------------------------------------------------------------------

    def _tables(self) -> None:
        for kind in TABLES:
            if kind == "trajectories":
                continue
            for path in self.bar(self.files[kind], kind):
                if (read := self._table(kind, path)) is not None and kind == "dropped":
                    for index in set(read[0]["index_file"].to_pylist()) - self.sizes.keys():
                        self._find(path, f"it speaks of {index}, which is not there")

    def _generations(self) -> None:
        """Merged copies of indexes: whole, and in agreement with the index files that they hold."""
        for path, problem in generations.faults(self.store, deep=self.report.deep):
            self._find(path, f"it cannot be used: {problem}", "run `opgrpo compact`, which makes another")
        damaged = {finding.path for finding in self.report.findings}
        gone: dict[str, str] = {}
        for kind in generations.COMPACTED:
            for generation in self._readable(generations.documents(self.store, kind)):
                lost = generation.files.keys() - self.sizes.keys()
                gone |= dict.fromkeys(lost, generation.path)
                if lost or generation.path in damaged:
                    continue
                for file, rows in generation.files.items():
                    if self.rows.get(file, rows) != rows:
                        problem = f"it tells {rows} rows of {file}, which has {self.rows[file]}"
                        self._find(generation.path, problem, "run `opgrpo compact`")
                break  # what is older nobody reads
        for file, path in gone.items():
            self._find(file, f"it is gone; {path} holds a copy of its rows")

    def _readable(self, paths: Sequence[str]) -> Iterator[Generation]:
        """Generations whose JSON can be read, newest first; not those that were made since we began."""
        for path in (path for path in reversed(paths) if path in self.sizes):
            self.report.files += 1  # its Parquet file
            if self._document(path) is not None:
                with suppress(ValueError, FileNotFoundError):  # told of already, where a reader could take it
                    yield generations.read_generation(self.store.directory, path)


def _needed(kind: str, document: Mapping[str, Any]) -> list[str]:
    """Files that a document needs beside it."""
    if kind == "policies":
        return [weights_path(str(document["policy_id"]))] if document.get("kind") == "average" else []
    if kind == "runs":
        prompts, base = document.get("prompts"), document.get("base_policy_id")
        files = [str(path) for path in prompts.values()] if isinstance(prompts, dict) else []
        files += [str(document[key]) for key in ("imported_buffer", "offline_selection") if document.get(key)]
        return files + ([f"policies/{base}/policy.json"] if base else [])
    return [f"runs/{document['run_id']}.json"]
