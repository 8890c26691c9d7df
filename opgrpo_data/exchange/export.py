"""Export of trajectories as a dataset: a new folder or bucket prefix, filled page by page, its manifest written last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opgrpo_data.errors import StoreError
from opgrpo_data.exchange import tables, webdataset
from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.selection import Selection
from opgrpo_data.io import Directory
from opgrpo_data.seal import sealed_json
from opgrpo_data.store import Store, now

MANIFEST = "opgrpo-export.json"
FORMAT = "opgrpo-export"
VERSION = "1.0"

Writer = Callable[[Selection, Directory, LeftOut], list[dict[str, Any]]]
FORMS: Mapping[str, Writer] = {
    "webdataset": webdataset.write,
    "huggingface": tables.write_pictures,
    "preferences": tables.write_preferences,
    "sft": tables.write_sft,
}
"""Each writes all files but the manifest, and returns what it says of them: path, and rows or trajectories."""


def export_dataset(store: Store, to: str, form: str, *, reward: str | None = None, where: str | None = None) -> dict[str, Any]:
    """Write trajectories of a store as a dataset of one of FORMS into a new or empty folder or bucket prefix `to`.

    reward, where: which value counts and which trajectories are taken, see Selection. Damaged, quarantined and dropped
    trajectories are left out and counted. Returns the manifest, which is written last: a folder without it is an export that
    was cut short. Raises StoreError when `to` is not empty or lies in the store, and what Selection raises; ValueError when
    there is no such form.
    """
    if form not in FORMS:
        raise ValueError(f"there is no dataset form {form!r}: choose one of {', '.join(FORMS)}")
    target = _empty(store, to)
    selection = Selection(store, reward, where, needs_reward=form == "preferences" or (form == "sft" and where is None))
    left_out = LeftOut()
    files = FORMS[form](selection, target, left_out)
    rows = sum(file["rows"] for file in files)
    if not rows:
        raise StoreError(f"nothing is left to export: {left_out.told()}. Remove {to}, and choose other trajectories")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "form": form,
        "reward": None if selection.reward is None else str(selection.reward),
        "where": where,
        "trajectories": sum(page.trajectories for page in selection.pages),
        "left_out": dict(left_out.counts),
        "left_out_because": left_out.messages,
        "files": files,
        "created_at": now().isoformat(),
    }
    if not target.publish(MANIFEST, sealed_json(manifest, indent=1)):
        raise StoreError(f"another export wrote to {to} at the same time: remove it and export again")
    return {**manifest, "to": to, "files": len(files), "rows": rows}


def _empty(store: Store, to: str) -> Directory:
    """The place to write to. Raises StoreError unless it is free, and outside the store."""
    target = Directory(to)
    inside = f"{target.root}/".startswith(f"{store.directory.root}/")
    if target.local == store.directory.local and inside:
        raise StoreError(f"{to} lies in the store {store.directory.url}: choose a folder outside it")
    if target.exists(MANIFEST):
        raise StoreError(f"{to} holds an export already: choose another folder")
    if target.entries():
        raise StoreError(
            f"{to} is not empty, and holds no finished export: choose another folder, or, if an export to it was cut short, "
            f"remove it and export again"
        )
    return target
