"""Streaming: plans of 23 fresh and 1 replayed trajectory a group, against plain sequential reads of the same tars."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from statistics import mean, median

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.store import raw
from benchmarks.store.data import SD3, SMALL, Size, records
from benchmarks.store.machine import Measure, measured
from opgrpo_data.plan import PlanRule, WeightRule, build_plan
from opgrpo_data.reading import memory
from opgrpo_data.schema import PLANS, REWARDS
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store, iteration_folder
from opgrpo_data.stream import RING, WINDOW_BYTES, stream

GROUP = 24
GROUPS_A_SHARD = 8
STEP_SECONDS = 0.05
SEQUENTIAL = "of raw sequential read"

RULE = PlanRule(
    advantage_parts="sum",
    advantage_std="group",
    advantage_clip=5.0,
    weight=WeightRule("sequence", "sum", None, 0.0, 2.0, False),
    reuse_ess=0.0,
    epochs=1,
    optimizer_steps=2,
    lr_by_signal=False,
    microbatch=GROUP,
    window=None,
    step_fraction=1.0,
    objective="clipped",
    seed=0,
)


def measure(work: Path, quick: bool) -> dict[str, Measure]:
    """stream_cold_sd3, stream_warm_sd3, stream_cold_small: ratios of speeds. stall_ms_sd3: of a batch, training on another."""
    repeats = 2 if quick else 7
    sd3 = _Planned(work / "sd3", SD3, groups=2 if quick else 48)
    small = _Planned(work / "small", SMALL, groups=2 if quick else 64, iterations=1 if quick else 8)
    return {
        "stream_cold_sd3": sd3.compared(repeats, 0.75, cold=True),
        "stream_warm_sd3": sd3.compared(repeats, 0.85, cold=False),
        "stream_cold_small": small.compared(repeats, 0.6, cold=True),
        "stall_ms_sd3": sd3.stall(),
    }


class _Planned:
    """A store of some iterations' groups and of older shards, and the plans that `opgrpo select` makes of them."""

    def __init__(self, place: Path, size: Size, *, groups: int, iterations: int = 1) -> None:
        store = Store.create(str(place))
        self.directory, self.size = store.directory, size
        old = _written(store, size, 0, groups * iterations * 2, 2)  # one trajectory of each such shard comes back
        self.plans = []
        for k in range(iterations):
            new = _written(store, size, 1 + k, groups * GROUP, GROUPS_A_SHARD * GROUP)
            fresh = new.filter(pc.less(new["member_index"], GROUP - 1))
            replayed = old.take((np.arange(groups) + k * groups) * 2)
            self.plans.append(_plan(fresh, _reused(replayed), 1 + k))
        self.rows = sum(plan.num_rows for plan in self.plans)
        assert self.rows == iterations * groups * GROUP
        self.tars = sorted(place.rglob("*.latents.tar"))
        self.fresh = [tar for tar in self.tars if tar.parent.name != "iter=000000"]
        self.into = memory(RING * max(GROUP * size.latent_bytes, WINDOW_BYTES))

    def ours(self) -> float:
        """Bytes a second."""
        began, total = time.perf_counter(), 0
        for plan in self.plans:
            for batch in stream(self.directory, plan):
                assert not batch.damaged
                total += sum(latents.nbytes for latents in batch.latents)
        assert total == self.rows * self.size.latent_bytes
        return total / (time.perf_counter() - began)

    def compared(self, repeats: int, bound: float, *, cold: bool) -> Measure:
        """Both by turns. The limit reads the tars of these iterations into memory of the ring's size."""
        ours, limits = [], []
        for _ in range(repeats + 1):
            if cold:
                raw.drop(self.tars)
            limits.append(raw.sequential(self.fresh, self.into))
            if cold:
                raw.drop(self.tars)
            ours.append(self.ours())
        ours, limits = ours[1:], limits[1:]  # the first fills the page cache, and touches new memory
        speeds = [median(it) / 1e9 for it in (ours, limits)]
        told = f"{speeds[0]:.2f} GB/s verified, raw {speeds[1]:.2f} GB/s; {self.rows:,} trajectories, shuffled"
        return measured([a / b for a, b in zip(ours, limits, strict=True)], ">=", bound, SEQUENTIAL, told)

    def stall(self) -> Measure:
        """Milliseconds that each batch is waited for, its rows included; what a step needs before the first is not counted."""
        raw.drop(self.tars)
        batches = stream(self.directory, self.plans[0])
        stalls = []
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            assert len(batch.rows) == GROUP
            stalls.append((time.perf_counter() - began) * 1e3)
            time.sleep(STEP_SECONDS)
        first, stalls = stalls[0], stalls[1:]
        told = f"mean {mean(stalls):.2f} ms, worst {max(stalls):.1f} ms of {len(stalls)}; the first batch took {first:.0f} ms"
        return measured(stalls, "<=", 2.0, f"ms a batch of {GROUP} at a step of {STEP_SECONDS * 1e3:.0f} ms, cold", told)


def _written(store: Store, size: Size, iteration: int, count: int, each: int) -> pa.Table:
    """So many new trajectories of one iteration, in shards of `each`."""
    made, folder, shard = records(size, count, iteration=iteration), iteration_folder("trajectories", "benchmark", iteration), 0
    while some := list(islice(made, each)):
        write_shard(store.directory, folder, f"{shard:05d}", some)
        shard += 1
    return store.read_tables("trajectories", store.files("trajectories", iteration=iteration))


def _plan(rows: pa.Table, reused: pa.Table, iteration: int) -> pa.Table:
    """The plan of rows with random rewards."""
    count, names = rows.num_rows, rows["trajectory_id"]
    values = np.random.default_rng(iteration).random(count)
    told = {"reward": ["r"] * count, "version": ["1"] * count, "detail": ["{}"] * count, "error": [None] * count}
    rewards = pa.table({"trajectory_id": names, "value": values, **told}, schema=REWARDS)
    return build_plan(rows, rewards, reused, set(), iteration=iteration, rule=RULE)


def _reused(rows: pa.Table) -> pa.Table:
    """Rows of an old plan, as the old policy of a later iteration judges them."""
    plan = _plan(rows, PLANS.empty_table(), 0)
    return pa.Table.from_pylist(
        [row | {"role": "reused", "path_variance": [0.01] * row["num_steps"]} for row in plan.to_pylist()], schema=PLANS
    )
