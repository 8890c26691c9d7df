"""One trajectory: prompt, lineage, rewards, what training did with it, and its latents decoded from noise to sample."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import StoreError
from opgrpo_data.exchange.selection import IS_DROPPED
from opgrpo_data.io import checked_name
from opgrpo_data.places.local import LocalFiles
from opgrpo_data.store import Store
from pipelines.rewards.base import Media

BEST = "best"
"""No id begins like that: ids are hexadecimal."""
CELL = 128
"""Height in pixels of each picture of a strip; small ones are enlarged without smoothing."""
SHOWN = (
    "trajectory_id", "run_id", "iteration", "group_id", "member_index", "policy_id", "base_model", "sampler", "num_steps",
    "noise_level", "guidance_scale", "seed", "latent_dtype", "latent_shape", "latents_file", "media_file", "created_at",
)  # fmt: skip

_BEST = """
WITH newest AS (SELECT arg_max(config -> 'reward' ->> 'name', created_at) AS name FROM runs)
SELECT trajectory_id FROM rewards JOIN trajectories USING (trajectory_id)
WHERE isfinite(value) AND trajectory_id NOT IN (SELECT trajectory_id FROM quarantine)
    AND reward = coalesce((SELECT name FROM newest WHERE name IN (SELECT reward FROM rewards)), reward)
ORDER BY value DESC, trajectory_id LIMIT 1
"""
_BEGINNING = """
SELECT DISTINCT trajectory_id FROM trajectories WHERE starts_with(trajectory_id, '{id}') ORDER BY trajectory_id LIMIT 4
"""
_ROW = """
SELECT t.*, text, metadata,
    {dropped} AS dropped
FROM trajectories t LEFT JOIN prompts USING (prompt_id)
WHERE trajectory_id = '{id}' ORDER BY latents_file LIMIT 1
"""
# UNION, not UNION ALL: a chain that a damaged index closes to a circle ends.
_PARENTS = """
WITH RECURSIVE chain AS (
    SELECT parent_id FROM trajectories WHERE trajectory_id = '{id}' AND parent_id IS NOT NULL
    UNION SELECT t.parent_id FROM trajectories t JOIN chain c ON t.trajectory_id = c.parent_id WHERE t.parent_id IS NOT NULL
)
SELECT DISTINCT chain.parent_id AS trajectory_id, run_id, iteration, prefix_steps
FROM chain LEFT JOIN trajectories t ON t.trajectory_id = chain.parent_id ORDER BY iteration DESC
"""
_CHILDREN = """
SELECT DISTINCT trajectory_id, run_id, iteration, prefix_steps FROM trajectories WHERE parent_id = '{id}' ORDER BY ALL
"""
_REWARDS = """
SELECT DISTINCT reward, version, value, error FROM (FROM rewards UNION ALL BY NAME FROM reward_errors)
WHERE trajectory_id = '{id}' ORDER BY ALL
"""
_USES = """
SELECT run_id, iteration, role, count(*) AS optimizer_steps, any_value(advantage) AS advantage,
    any_value(importance_weight) AS importance_weight, any_value(age) AS age, sum(loss) AS loss
FROM updates WHERE trajectory_id = '{id}' GROUP BY ALL ORDER BY ALL
"""
_BUFFERS = """
SELECT run_id, min(iteration) AS first_iteration, max(iteration) AS last_iteration, count(*) AS iterations
FROM buffer WHERE trajectory_id = '{id}' GROUP BY ALL ORDER BY ALL
"""
_QUARANTINE = "SELECT reason, file, member, noticed_at FROM quarantine WHERE trajectory_id = '{id}'"


def show(store: Store, trajectory: str, to: Path | None = None) -> dict[str, Any]:
    """What is known of a trajectory; with `to`, also a PNG there: all T+1 latents decoded, with their sigmas, noise first.

    trajectory: its id, the beginning of it, or `best`: the one with the highest reward (the newest run's, where there are
    several), damaged ones aside. Of videos the middle frame is shown. Without `to` no model is loaded. Where the pictures
    cannot be made the rest is told all the same, and why not under `no_picture`. Raises StoreError when there is no such
    trajectory, or several; ValueError when `to` is there already; OSError when it cannot be written.
    """
    if to is not None:
        store.outside(str(to))
        if to.exists():
            raise ValueError(f"{to} is there already: choose another file")
    catalog = Catalog(store)
    name = _find(catalog, trajectory)
    [row] = _ask(catalog, _ROW, name)
    quarantine = _ask(catalog, _QUARANTINE, name)
    told: dict[str, Any] = {
        "prompt": row["text"],
        "metadata": None if row["metadata"] is None else json.loads(row["metadata"]),
        **{column: row[column] for column in SHOWN},
        "rewards": _ask(catalog, _REWARDS, name),
        "parents": _ask(catalog, _PARENTS, name),
        "children": _ask(catalog, _CHILDREN, name),
        "uses": _ask(catalog, _USES, name),
        "buffers": _ask(catalog, _BUFFERS, name),
        "quarantine": quarantine[0]["reason"] if quarantine else None,
        "dropped": row["dropped"],
    }
    return told if to is None else told | _drawn(store, row, to)


class _NoPictureError(Exception):
    """The strip cannot be drawn: why."""


def _drawn(store: Store, row: dict[str, Any], to: Path) -> dict[str, Any]:
    """Draw the strip of a trajectory into a new file, whole or not at all; returns where it is, or why there is none."""
    try:
        with LocalFiles().write_atomic(str(to)) as file:  # before a model is loaded for nothing
            file.write(_picture(store, row))
    except _NoPictureError as error:
        return {"picture": None, "no_picture": str(error)}
    except OSError as error:
        raise OSError(error.errno, f"cannot write {to}: {error.strerror}") from error
    return {"picture": str(to)}


def _picture(store: Store, row: dict[str, Any]) -> bytes:
    try:
        return strip(_decoded(store, row), row["sigmas"])
    except (ValueError, OSError) as error:
        raise _NoPictureError(" ".join(str(error).split())) from error


def _ask(catalog: Catalog, sql: str, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = catalog.query(sql.format(id=name, dropped=IS_DROPPED)).to_pylist()
    return rows


def _find(catalog: Catalog, trajectory: str) -> str:
    """The one id that is meant."""
    if trajectory == BEST:
        found = catalog.query(_BEST)["trajectory_id"].to_pylist()
        if not found:
            raise StoreError("no trajectory of the store has a reward: run `opgrpo score` first")
        return str(found[0])
    found = [row["trajectory_id"] for row in _ask(catalog, _BEGINNING, checked_name(trajectory, "trajectory_id"))]
    if not found:
        raise StoreError(f"the store has no trajectory {trajectory}: see the view trajectories of `opgrpo sql`, or say `best`")
    if trajectory not in found and len(found) > 1:
        raise StoreError(f"several trajectories begin with {trajectory}, among them {', '.join(found)}")
    return str(found[0])


def _decoded(store: Store, row: dict[str, Any]) -> list[Media]:
    """Samples of x_0 .. x_T, by the decoder of the model that its run began with: training leaves the decoder as it is."""
    from pipelines.restore import build_model, check_files
    from pipelines.trajectories import read_prefix

    if row["dropped"]:
        raise StoreError("its latents were dropped by `opgrpo gc`")
    latents = read_prefix(store.directory, row, row["num_steps"])
    run = next(store.documents(f"runs/{checked_name(row['run_id'], 'run_id')}.json"), None)
    if run is None:
        raise StoreError(f"the store does not know run {row['run_id']}, whose model would decode its latents")
    config, policy = build_model(run, trust_code=False)  # to look at a store runs no code that it names
    check_files(run, config, policy)
    shape = tuple(latents.shape[1:])
    if shape != tuple(policy.latent_shape):
        raise StoreError(f"its latents are {shape}, the model of run {row['run_id']} draws {policy.latent_shape}")
    return [policy.decode(latent[None])[0] for latent in latents]


def strip(samples: Sequence[Media], sigmas: Sequence[float]) -> bytes:
    """A PNG of samples (uint8, (H, W, 3) or (F, H, W, 3)) in one row, each under its sigma."""
    stills = [Image.fromarray(sample[len(sample) // 2] if sample.ndim == 4 else sample) for sample in samples]
    gap, header = 4, 18
    sized = []
    for still in stills:
        smoothing = Image.Resampling.NEAREST if still.height < CELL else Image.Resampling.LANCZOS
        sized.append(still.resize((max(1, round(still.width * CELL / still.height)), CELL), smoothing))
    width = gap + sum(still.width + gap for still in sized)
    canvas = Image.new("RGB", (width, header + CELL + gap), (250, 250, 250))
    pen, left = ImageDraw.Draw(canvas), gap
    for still, sigma in zip(sized, sigmas, strict=True):
        pen.text((left, gap), f"sigma {sigma:.3f}", fill=(30, 30, 30))
        canvas.paste(still, (left, header))
        left += still.width + gap
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()
