"""What the runs of a store hold: a row for each, for `opgrpo store ls`."""

from __future__ import annotations

from typing import Any

from opgrpo_data.catalog import Catalog
from opgrpo_data.exchange.selection import IS_DROPPED
from opgrpo_data.store import Store

# A run may be known by its document alone (nothing drawn yet), or by trajectories alone (imported).
_RUNS = """
WITH drawn AS (
    SELECT run_id, count(*) AS trajectories,
        count(*) FILTER (WHERE quarantined AND NOT dropped) AS quarantined,
        count(*) FILTER (WHERE dropped) AS dropped,
        coalesce(sum(latents_length + media_length) FILTER (WHERE NOT dropped), 0) / 1e9 AS gigabytes
    FROM (
        SELECT run_id, latents_length, media_length,
            trajectory_id IN (SELECT trajectory_id FROM quarantine) AS quarantined,
            {dropped} AS dropped
        FROM trajectories
    )
    GROUP BY 1
),
scored AS (
    SELECT run_id, string_agg(reward || '@' || version || ' ' || n, ', ' ORDER BY reward, version) AS rewards
    FROM (
        SELECT run_id, reward, version, count(DISTINCT trajectory_id) AS n
        FROM rewards JOIN trajectories USING (trajectory_id) GROUP BY ALL
    )
    GROUP BY 1
),
trained AS (SELECT run_id, count(DISTINCT iteration) AS iterations FROM updates GROUP BY 1),
kept AS (SELECT run_id, count(*) FILTER (WHERE has_weights) AS kept_policies FROM policies GROUP BY 1)
SELECT run_id, runs.created_at, coalesce(iterations, 0) AS iterations, coalesce(trajectories, 0) AS trajectories,
    coalesce(gigabytes, 0) AS gigabytes, coalesce(rewards, '') AS rewards, coalesce(kept_policies, 0) AS kept_policies,
    coalesce(quarantined, 0) AS quarantined, coalesce(dropped, 0) AS dropped
FROM runs FULL JOIN drawn USING (run_id) LEFT JOIN scored USING (run_id) LEFT JOIN trained USING (run_id)
    LEFT JOIN kept USING (run_id)
ORDER BY runs.created_at, run_id
"""


def listing(store: Store) -> list[dict[str, Any]]:
    """A row for each run, the oldest first.

    run_id. created_at: None where only its trajectories are known. iterations: those that are trained. trajectories.
    gigabytes: of latents and media. rewards: each with how many trajectories it has a value for. kept_policies: those whose
    weights the store has. quarantined, dropped: trajectories. pinned: whether `opgrpo gc` leaves it whole.
    """
    pins = store.pins()
    return [
        row | {"pinned": row["run_id"] in pins} for row in Catalog(store).query(_RUNS.format(dropped=IS_DROPPED)).to_pylist()
    ]
