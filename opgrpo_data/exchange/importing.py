"""Import: what a source is, whether the store may take it, and trajectories out of WebDataset tars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from opgrpo_data.catalog import Catalog
from opgrpo_data.checks import checked_path, read_object
from opgrpo_data.errors import StoreError
from opgrpo_data.exchange import receive, stores, webdataset
from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.target import FORMAT, MANIFEST, UNFINISHED, VERSION
from opgrpo_data.exchange.webdataset import Sample
from opgrpo_data.io import Directory
from opgrpo_data.shards import write_shard
from opgrpo_data.store import MARKER, Store, iteration_folder

CHUNK_BYTES = 128 * 2**20
"""Latents and media in memory at a time; more only where one trajectory has more."""


def import_dataset(source: str, to: str, *, merge: bool = False) -> dict[str, Any]:
    """Take over what `source` holds, another store or what `opgrpo export --as webdataset` wrote, into the store at `to`, which
    is made where there is none.

    What is there already is skipped, so that an import that was cut short is finished by the same command with merge. Damaged
    trajectories are not taken, and counted. merge: also into a store that holds something. Returns what was done. Raises
    StoreError when the source is none of these, when it and the store lie one in the other, when the store holds something and
    merge is not given, or when the source has trajectories with other bytes than the store has under their ids.
    """
    place = Directory(source)
    _check_apart(place, Directory(to))
    theirs = Store.open(source) if place.exists(MARKER) else None
    if theirs is None and not place.exists(MANIFEST):
        raise StoreError(
            f"{source} has neither a {MARKER} nor an {MANIFEST}: name a store, or a folder that opgrpo export wrote"
        )
    tars = [] if theirs is not None else _tars(place)
    store = Store.create(to)
    if not merge and set(store.directory.list("*")) - {MARKER}:
        raise StoreError(
            f"the store {store.directory.url} holds something already: add --merge to keep that and take what is new (also to "
            f"finish an import that was cut short), or choose another store"
        )
    if theirs is not None:
        return {"source": source, "form": "store", **stores.take(theirs, store)}
    return {"source": source, "form": "webdataset", **_take_tars(place, tars, store)}


def _check_apart(source: Directory, target: Directory) -> None:
    """Raise StoreError where one lies in the other: what is imported would become part of what it is imported from."""
    if source.contains(target) and target.contains(source):
        raise StoreError(f"{source.url} is the store itself: name another one to import from")
    for outer, inner in ((source, target), (target, source)):
        if outer.contains(inner):
            raise StoreError(f"{inner.url} lies in {outer.url}: choose a source and a store that are apart")


def _take_tars(place: Directory, tars: Sequence[tuple[str, int]], store: Store) -> dict[str, Any]:
    left_out = LeftOut()
    counts = {"trajectories": 0, "already_there": 0, "prompts": 0, "rewards": 0}
    conflicts: list[str] = []
    sizes = {entry.path: entry.size for entry in place.entries()}
    for path, rows in tars:
        for chunk in _chunks(webdataset.read(place, path, sizes.get(path, 0), rows, left_out)):
            _take(chunk, store, counts, conflicts)
    receive.refuse(conflicts, store, place.url, f"They were left where they are, {counts['trajectories']} others were imported")
    return {**counts, "left_out": dict(left_out.counts), "left_out_because": left_out.messages}


def _tars(place: Directory) -> list[tuple[str, int]]:
    """Path and number of trajectories of each tar, out of the manifest. Raises StoreError where it does not tell them."""
    manifest = read_object(place, MANIFEST)
    form, version = manifest.get("form"), str(manifest.get("version"))
    if manifest.get("format") != FORMAT or version.partition(".")[0] != VERSION.partition(".")[0]:
        raise StoreError(
            f"{place.url}/{MANIFEST} is of no format that this software knows: {manifest.get('format')!r} {version}"
        )
    if UNFINISHED in manifest:
        raise StoreError(f"{place.url} is an export that was cut short: run the same `opgrpo export` again, which finishes it")
    if form != "webdataset":
        raise StoreError(
            f"{place.url} is an export as {form}: pictures without latents cannot become trajectories. Export the store that "
            f"they come from with --as webdataset, or import that store itself"
        )
    files = manifest.get("files")
    if not isinstance(files, list):
        raise StoreError(f"{place.url}/{MANIFEST} lists no files: it is damaged")
    listed = []
    for file in files:
        if not isinstance(file, dict) or not isinstance(file.get("path"), str) or not isinstance(file.get("rows"), int):
            raise StoreError(f"{place.url}/{MANIFEST} lists {file!r}: it is damaged")
        listed.append((checked_path(file["path"]), file["rows"]))
    return listed


def _chunks(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    size = 0
    for sample in samples:
        chunk.append(sample)
        size += sample.record.latents.nbytes + len(sample.record.media)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _take(chunk: Sequence[Sample], store: Store, counts: dict[str, int], conflicts: list[str]) -> None:
    """Prompts first, then shards, then rewards: what refers to something comes after it."""
    catalog = Catalog(store)
    counts["prompts"] += receive.add_prompts(store, catalog, [sample.prompt for sample in chunk if sample.prompt is not None])
    there = receive.held(catalog, {sample.record.row["trajectory_id"] for sample in chunk})
    homes: dict[str, str] = {}
    folders: dict[str, dict[str, Sample]] = {}
    for sample in chunk:
        row = sample.record.row
        name = row["trajectory_id"]
        if name in there:
            if there[name].same_as(row):
                homes[name] = there[name].index
                counts["already_there"] += 1
            else:
                conflicts.append(name)
        else:
            folder = iteration_folder("trajectories", row["run_id"], row["iteration"])
            folders.setdefault(folder, {})[name] = sample
    for folder, samples in folders.items():
        shard = receive.shard_name(list(samples), "import")
        write_shard(store.directory, folder, shard, [sample.record for sample in samples.values()])
        homes |= dict.fromkeys(samples, f"{folder}/{shard}.parquet")
        counts["trajectories"] += len(samples)
    counts["rewards"] += receive.add_rewards(store, homes, [row for sample in chunk for row in sample.rewards])
