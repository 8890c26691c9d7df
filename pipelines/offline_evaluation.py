"""Estimate a policy's reward from trajectories that other policies drew, and say how far that can be trusted.

Every stored transition has the density of whoever drew it, so the weight of a whole path under another policy is exact; what
is left to chance is how many paths still matter (docs/maths.md, section 9).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.exchange.reward_keys import find_reward, rewards_known
from opgrpo_data.importance import SelfNormalised, log_weight, predicted_ess, self_normalised
from opgrpo_data.store import Store
from pipelines import sampler
from pipelines.config import RunConfig
from pipelines.fitting import Asked, fitting, scored
from pipelines.policies.base import Policy
from pipelines.rescore import run_of, stored_prompts
from pipelines.restore import restore
from pipelines.sampler import Transitions
from pipelines.settings import RewardConfig
from pipelines.trajectories import Stored, evaluate, read_prefix

Row = Mapping[str, Any]

LEAST_SHARE = 0.1
"""Of the effective sample size: below it more than nine tenths of what is stored says nothing about the policy."""
LEAST_EFFECTIVE = 50
"""Effective trajectories: with fewer the standard error of a 0/1 reward may exceed 0.07, and its own estimate is poor."""
LARGEST_SHARE = 0.1
"""Of one weight: above it the answer hangs on a single trajectory."""
REMEDY = "Take newer trajectories (--last), draw some with this policy or one near it, or measure it: `opgrpo eval`"


@dataclass(frozen=True)
class Estimate:
    """What stored trajectories say about a policy.

    reward, version: what was estimated: the mean over trajectories that the policy would draw, by the sampler of its run, for
    the stored prompts as often as they are stored. runs: a remark about each. trajectories, groups: how many it was estimated
    from. iterations: the first and the last that they are of. mean, standard_error: the estimate. ess: effective trajectories,
    measured on the weights; ess_share: of all. predicted_ess_share: mean of exp(-sum of path variances), which does not look
    at the weights. mean_weight: near 1 where the law holds. max_weight_share: of the heaviest trajectory. stored_mean: of the
    rewards as they are stored, unweighted. left_out: trajectories that could not serve; unfit are those without the reward,
    drawn otherwise (see runs), dropped or in quarantine. meaningful, verdict: whether to believe the estimate, and why not.
    """

    policy_id: str
    reward: str
    version: str
    runs: list[str]
    iterations: list[int]
    trajectories: int
    groups: int
    mean: float
    standard_error: float
    ess: float
    ess_share: float
    predicted_ess_share: float
    mean_weight: float
    max_weight_share: float
    stored_mean: float
    left_out: dict[str, int]
    meaningful: bool
    verdict: str


def evaluate_offline(
    store: Store,
    policy_id: str,
    *,
    reward: str | None = None,
    run: str | None = None,
    iterations: int | None = None,
    trust_code: bool = False,
) -> Estimate:
    """Estimate E[reward] of a policy by self-normalised importance sampling over whole stored paths.

    policy_id, trust_code: as in `restore`. reward: its name, or NAME@VERSION where several versions are stored; None: that
    of the policy's run. run: only trajectories of this run (an id or the beginning of one); None: of every run. iterations:
    of each run only the newest so many, and of the policy's own none that come after it; None: all. Continuations are left
    out: their prefixes were selected for their rewards, which no weight corrects. Raises StoreError where nothing fits,
    ValueError as `restore`.
    """
    restored = restore(store, policy_id, trust_code=trust_code)
    config, policy = RunConfig.model_validate(restored.run["config"]), restored.policy
    catalog = Catalog(store)
    key = find_reward(catalog, reward or _reward_name(catalog, config.reward))
    asked, rewards = Asked.of(policy, config.rollout), scored(store, key.name, key.version)
    found = fitting(store, asked, rewards, files=_files(store, run, iterations, restored.document))
    fresh = found.trajectories.filter(pc.equal(pc.fill_null(found.trajectories["prefix_steps"], 0), 0))
    if not fresh.num_rows:
        reasons = "; ".join(found.told) or "there are none"
        raise StoreError(f"no stored trajectory can be weighed for policy {restored.document['policy_id']}: {reasons}")
    grid = sampler.transitions(config.rollout.sampler, policy.sigmas(config.rollout.num_steps), config.rollout.noise_level)
    paths = list(_weighed(store, policy, grid, fresh.to_pylist(), config.rollout.batch_size))
    if not paths:
        raise StoreError(f"all {fresh.num_rows} stored trajectories that fit are damaged: see `opgrpo verify`")
    left_out = {
        "continuations": found.trajectories.num_rows - fresh.num_rows,
        "damaged": fresh.num_rows - len(paths),
        "unfit": found.seen - found.trajectories.num_rows,
    }
    told = {"policy_id": restored.document["policy_id"], "reward": key.name, "version": key.version, "runs": found.told}
    return _estimate(paths, told, left_out)


def _reward_name(catalog: Catalog, config: RewardConfig) -> str:
    """What values of a configured reward are stored under. Raises StoreError where only code that the store names knows it."""
    if ":" in config.name:
        known = ", ".join(map(str, rewards_known(catalog)))
        raise StoreError(f"the policy was trained on {config.name!r}, which has a name of its own: --reward, one of {known}")
    return config.name


def _files(store: Store, run: str | None, iterations: int | None, document: Row) -> list[str]:
    """Index files of the trajectories to look at."""
    files = store.files("trajectories", run="*" if run is None else run_of(store, run))
    if iterations is None:
        return files
    kept = []
    for folder, mine in groupby(files, key=lambda path: path.split("/")[1]):
        of = {path: int(path.split("/iter=")[1].split("/")[0]) for path in mine}
        last = document["iteration"] if folder == f"run={document['run_id']}" else max(of.values())
        newest = sorted({number for number in of.values() if number <= last})[-iterations:]
        kept += [path for path, number in of.items() if number in newest]
    return kept


@dataclass(frozen=True)
class WeighedPath:
    """A stored trajectory under the policy. log_weight: its log-density less that under whoever drew it. predicted: exp(-sum of
    path variances)."""

    row: Row
    log_weight: float
    predicted: float


def _weighed(store: Store, policy: Policy, grid: Transitions, rows: Sequence[Row], size: int) -> Iterator[WeighedPath]:
    """Every readable row, weighed over all steps that have a density."""
    texts = {name: prompt.text for name, prompt in stored_prompts(store).items()}
    for start in range(0, len(rows), size):
        batch = []
        for row in rows[start : start + size]:
            with suppress(CorruptionError):
                batch.append((row, read_prefix(store.directory, row, grid.num_steps)))
        if not batch:
            continue
        read = [row for row, _ in batch]
        behaviour, seeds = [row["behaviour_logprob"] for row in read], [row["noise_seeds"] for row in read]
        states = torch.stack([states for _, states in batch]).to(policy.device)
        stored = Stored([texts[row["prompt_id"]] for row in read], states, behaviour, seeds)
        densities = evaluate(policy, stored, grid)
        for row, logprob, variance in zip(read, densities.logprob.tolist(), densities.path_variance.tolist(), strict=True):
            yield WeighedPath(row, log_weight(logprob, row["behaviour_logprob"]), predicted_ess(variance))


def _estimate(paths: Sequence[WeighedPath], told: dict[str, Any], left_out: dict[str, int]) -> Estimate:
    values = np.array([path.row["reward"] for path in paths])
    groups = [path.row["group_id"] for path in paths]
    found = self_normalised(np.array([path.log_weight for path in paths]), values, groups)
    numbers = [path.row["iteration"] for path in paths]
    reasons = _doubts(found, len(paths))
    return Estimate(
        **told,
        iterations=[min(numbers), max(numbers)],
        trajectories=len(paths),
        groups=len(set(groups)),
        mean=found.mean,
        standard_error=found.standard_error,
        ess=found.ess,
        ess_share=found.ess / len(paths),
        predicted_ess_share=float(np.mean([path.predicted for path in paths])),
        mean_weight=found.mean_weight,
        max_weight_share=found.max_share,
        stored_mean=float(values.mean()),
        left_out=left_out,
        meaningful=not reasons,
        verdict="meaningful" if not reasons else f"meaningless: {'; '.join(reasons)}. {REMEDY}",
    )


def _doubts(found: SelfNormalised, count: int) -> list[str]:
    """Why an estimate from `count` trajectories means nothing; none where it means something."""
    doubts = []
    if found.ess < LEAST_EFFECTIVE:
        doubts.append(f"the effective sample size is {found.ess:.1f} trajectories, below {LEAST_EFFECTIVE}")
    if found.ess < LEAST_SHARE * count:
        doubts.append(f"that is {found.ess / count:.2%} of the {count} there are, below {LEAST_SHARE:.0%}")
    if found.max_share > LARGEST_SHARE:
        doubts.append(f"one trajectory has {found.max_share:.0%} of the weight, more than {LARGEST_SHARE:.0%}")
    return doubts
