"""Which reward is meant: NAME, NAME@VERSION, or the only one there is."""

from __future__ import annotations

from dataclasses import dataclass

from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import StoreError


@dataclass(frozen=True)
class RewardKey:
    """One reward in one version."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def rewards_known(catalog: Catalog) -> list[RewardKey]:
    """The rewards that some trajectory has a value of, sorted."""
    rows = catalog.query("SELECT DISTINCT reward, version FROM rewards ORDER BY ALL").to_pylist()
    return [RewardKey(row["reward"], row["version"]) for row in rows]


def find_reward(catalog: Catalog, wanted: str | None) -> RewardKey:
    """The reward that a user means by `NAME`, `NAME@VERSION`, or None: the only one there is.

    Raises StoreError when the store has no values of it, or of several versions, or, for None, of several rewards.
    """
    name, _, version = (wanted or "").partition("@")
    keys = rewards_known(catalog)
    fitting = [key for key in keys if wanted is None or (key.name == name and version in ("", key.version))]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(map(str, keys)) or "none: run `opgrpo score` first"
    if wanted is None:
        raise StoreError(f"--reward is needed to say which value counts; the store has {known}")
    if not fitting:
        raise StoreError(f"the store has no values of reward {wanted!r}; it has {known}")
    versions = ", ".join(map(str, fitting))
    raise StoreError(f"reward {name!r} has values in several versions: give --reward as one of {versions}")
