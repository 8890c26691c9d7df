"""Export of trajectories as a dataset: a folder or bucket prefix, claimed, filled page by page, its manifest written last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opgrpo_data.errors import StoreError
from opgrpo_data.exchange import tables, webdataset
from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.selection import Selection
from opgrpo_data.exchange.target import FORMAT, VERSION, Target
from opgrpo_data.store import Store, now

Writer = Callable[[Selection, Target, LeftOut], list[dict[str, Any]]]
FORMS: Mapping[str, Writer] = {
    "webdataset": webdataset.write,
    "huggingface": tables.write_pictures,
    "preferences": tables.write_preferences,
    "sft": tables.write_sft,
}
"""Each writes all files but the manifest, and returns what it says of them: path, and rows or trajectories."""


def export_dataset(store: Store, to: str, form: str, *, reward: str | None = None, where: str | None = None) -> dict[str, Any]:
    """Write trajectories of a store as a dataset of one of FORMS into the folder or bucket prefix `to`.

    `to` is new or empty, or holds an export that was cut short, which is begun anew. reward, where: which value counts and
    which trajectories are taken, see Selection. Damaged, quarantined and dropped trajectories are left out and counted. Returns
    the manifest, which is written last. Raises StoreError when `to` holds anything else or lies in the store, when nothing is
    left to export, when another export to it begins meanwhile, and what Selection raises; ValueError when there is no such
    form.
    """
    if form not in FORMS:
        raise ValueError(f"there is no dataset form {form!r}: choose one of {', '.join(FORMS)}")
    target = Target(store.outside(to))
    selection = Selection(store, reward, where, needs_reward=form == "preferences" or (form == "sft" and where is None))
    left_out = LeftOut()
    target.claim()
    files = FORMS[form](selection, target, left_out)
    rows = sum(file["rows"] for file in files)
    if not rows:
        target.abandon()
        raise StoreError(f"nothing is left to export: {left_out.told()}. Choose other trajectories")
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
    target.finish(manifest)
    return {**manifest, "to": to, "files": len(files), "rows": rows}
