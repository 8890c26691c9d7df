"""Policies out of a store: by id, by its beginning, and the last one."""

from __future__ import annotations

from pathlib import Path

import pytest

from opgrpo_data.errors import StoreError
from pipelines import weights
from pipelines.restore import restore
from tests.pipelines.helpers import forked


def test_last_is_the_average_that_was_stored_last(replayed: Path, tmp_path: Path) -> None:
    """Whatever its iteration and its id: here the second is of an earlier iteration, as after `opgrpo eval --iteration 1`."""
    experiment = forked(replayed, tmp_path)
    for iteration in (2, 1):
        policy_id = experiment.keep_average(iteration)
        last = restore(experiment.store, "last")
        assert last.document["policy_id"] == policy_id
        assert last.document["iteration"] == iteration
        assert weights.policy_id(weights.trainable(last.policy.trainable)) == policy_id
    assert restore(experiment.store, policy_id[:6]).document == last.document


def test_there_may_be_no_last(replayed: Path, tmp_path: Path) -> None:
    """Base and trained policies are not what an evaluation would use."""
    experiment = forked(replayed, tmp_path)
    message = "the store has no averaged policy yet: finish a run, or name a policy of the view policies"
    with pytest.raises(StoreError, match=message):
        restore(experiment.store, "last")
