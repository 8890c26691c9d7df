"""Another reward for trajectories that are stored: pictures are judged anew, and nothing is generated again.

Values go where `opgrpo score CONFIG` puts them: a run that is configured with that reward finds them.
"""

from __future__ import annotations

import json

from opgrpo_data.errors import StoreError
from opgrpo_data.store import Store
from pipelines.experiment import Outcome
from pipelines.progress import Progress
from pipelines.prompts import Prompt
from pipelines.rewards.base import build_reward
from pipelines.score import score_shards
from pipelines.settings import RewardConfig


def rescore(store: Store, config: RewardConfig, *, run: str | None, dry_run: bool, progress: Progress) -> Outcome:
    """Score every trajectory of the store, or of one run, that lacks a value of this reward in its present version.

    run: run_id, or the beginning of one. Damaged media become error rows as in `score`, those that `opgrpo gc` dropped are
    counted (`dropped` in the detail). Raises StoreError when there are no trajectories or the run is not one, ValueError when
    the reward cannot be built, fails on every sample, or a worker died.
    """
    shards = store.files("trajectories") if run is None else store.files("trajectories", run=run_of(store, run))
    if not shards:
        raise StoreError(f"the store {store.directory.url} has no trajectories to score: run `opgrpo rollout` first")
    bar = progress.bar(shards, f"score {config.name}")
    reward = build_reward(config.name, config.options)
    return score_shards(store, bar, reward, config, stored_prompts(store), progress, None, dry_run)


def run_of(store: Store, run: str) -> str:
    """The run with this id, or the one that begins like it, of those that have trajectories. Raises StoreError."""
    runs = sorted({path.split("/")[1].removeprefix("run=") for path in store.files("trajectories")})
    found = [run] if run in runs else [name for name in runs if name.startswith(run)]
    if len(found) != 1:
        said = f"several runs begin with {run!r}: {found}" if found else f"no run of this store with trajectories is {run!r}"
        raise StoreError(f"{said}; it has {runs}")
    return found[0]


def stored_prompts(store: Store) -> dict[str, Prompt]:
    """prompt_id to prompt, of every run and split."""
    rows = store.read_tables("prompts", store.files("prompts")).to_pylist()
    return {row["prompt_id"]: Prompt(row["text"], json.loads(row["metadata"])) for row in rows}
