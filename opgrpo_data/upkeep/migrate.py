"""Raise a store to the present format version. Nothing in it is rewritten but the version in its store.json.

Stores of older minor versions are read and trained on as they are. What older software could not understand, dropped shards
and compacted indexes, is written in stores of the present version alone: there, older software refuses to open them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from opgrpo_data.checksum import crc32
from opgrpo_data.errors import StoreError
from opgrpo_data.schema import SCHEMA_VERSION
from opgrpo_data.seal import check_seal, read_json, sealed_json
from opgrpo_data.store import MARKER, TABLES, Store, now
from opgrpo_data.upkeep.verify import verify

CHANGES: Mapping[str, tuple[str, ...]] = {
    "1.1": (
        "table densities: the old policy on past trajectories that group reuse brings back",
        "buffers: member_index, fresh_mean, fresh_std",
        "plans: born_iteration, member_index, lr_scale, first_latent, last_latent, age, prefix_steps, path_variance, "
        "predicted_ess, transition_std, num_elements",
        "updates: group_id, age, reward, advantage, path_variance, predicted_ess",
    ),
    "1.2": (
        "quarantine: reason (checksum, truncated, missing)",
        "table dropped: shards whose latents and media opgrpo gc removed",
        "pins: runs whose trajectories opgrpo gc keeps",
        "catalog: compacted indexes",
        "seals: a checksum in every table and document, against which opgrpo verify holds it",
    ),
}
"""What each version brought. Older files are not rewritten: columns that they lack are null."""


def migrate(url: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Raise the store at `url` to SCHEMA_VERSION after a fast verify; say what that changes.

    Tables and documents without a seal stay as they are; their checksums are written down beside, so that from now on
    `opgrpo verify` notices every change in them too. Raises StoreError when the store is newer, of another major version, or
    damaged.
    """
    store = Store.open(url)
    version = store.version
    told = {"store": store.directory.url, "from": version, "to": SCHEMA_VERSION, "dry_run": dry_run}
    if version == SCHEMA_VERSION:
        return told | {"changes": []}
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise StoreError(f"{url} has format version {version}: only stores of version {SCHEMA_VERSION[0]} can be migrated")
    if findings := [finding for finding in verify(store, deep=False).findings if finding.kind == "damage"]:
        first = findings[0]
        raise StoreError(
            f"{len(findings)} things are wrong in {url}, the first: {first.path}: {first.problem}; {first.remedy}. "
            f"Run `opgrpo verify --store {shlex.quote(url)}` and mend them before you migrate"
        )
    if not dry_run:
        document = read_json(store.directory.read(MARKER)) | {"version": SCHEMA_VERSION}
        moment = now().isoformat()
        record = {"from": version, "to": SCHEMA_VERSION, "migrated_at": moment, "unsealed": _unsealed(store)}
        # The marker is the commit, and goes last. Until then another attempt writes the record anew.
        for path, content in ((f"migrations/{version}-{SCHEMA_VERSION}.json", record), (MARKER, document)):
            with store.directory.write_atomic(path) as file:
                file.write(sealed_json(content, indent=1))
    brought = {number: list(changes) for number, changes in CHANGES.items() if _number(number) > _number(version)}
    return told | {"changes": [f"{number}: {change}" for number, changes in brought.items() for change in changes]}


def _unsealed(store: Store) -> dict[str, str]:
    """crc32 of every table and document that has no seal."""
    documents = [path for pattern in ("policies/*/policy.json", "runs/*.json") for path in store.directory.list(pattern)]
    tables = [path for kind in TABLES for path in store.files(kind)]
    contents = ((path, store.read(path)) for path in (*tables, *documents))
    return {path: f"{crc32(data):08x}" for path, data in contents if not check_seal(data)}


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
