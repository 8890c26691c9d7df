"""Policies out of a store: the model that a run began with, wearing the weights that the store kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from opgrpo_data.errors import StoreError
from opgrpo_data.io import checked_name
from opgrpo_data.store import Store
from pipelines import weights
from pipelines.learner import read_state
from pipelines.policies.base import POLICIES, Policy
from pipelines.settings import PolicyConfig

LAST = "last"
"""No id begins like that: ids are hexadecimal."""


@dataclass(frozen=True)
class Restored:
    """A policy of a store. document: its policy.json. run: what `init` wrote down about its run. config: how its model is
    built."""

    policy: Policy
    document: dict[str, Any]
    run: dict[str, Any]
    config: PolicyConfig


def restore(store: Store, policy_id: str, *, trust_code: bool = False) -> Restored:
    """Build the model of a policy and give it the policy's weights. policy_id: the id, or the beginning of it, or `last`, the
    average that was stored last: the policy that the latest run has come to.

    trust_code: also where the store names Python code from outside opgrpo, which would run: a store may come from anyone.
    Raises StoreError when the store has no such policy, several, or not its weights; ValueError when the model cannot be
    loaded, or is not the one that the policy was trained on.
    """
    document = _document(store, policy_id)
    run = next(store.documents(f"runs/{checked_name(document['run_id'], 'run_id')}.json"))
    config, policy = build_model(run, trust_code=trust_code)
    kept = _weights(store, document)
    if kept is None:
        kept = weights.masters(policy.trainable)
    else:
        weights.copy_into(policy.trainable, kept)
    if (found := weights.policy_id(kept, policy.identity)) != document["policy_id"]:
        raise StoreError(
            f"the model {config.model!r} is not the one that policy {document['policy_id']} was made of: with this one it "
            f"is {found}. Restore the model's files"
        )
    check_files(run, config, policy)
    policy.prepare(store.directory, [])
    return Restored(policy, document, run, config)


def build_model(run: Mapping[str, Any], *, trust_code: bool) -> tuple[PolicyConfig, Policy]:
    """The model that a run began with, by the document of the run. trust_code: see `restore`.

    Raises StoreError where its code is not opgrpo's and not trusted, ValueError when it cannot be loaded.
    """
    config = PolicyConfig.model_validate(run["config"]["policy"])
    if config.family not in POLICIES.known and not trust_code:
        raise StoreError(
            f"the policy of run {run['run_id']} is built by {config.family!r}, Python code that is not opgrpo's: to run it, "
            f"add --trust-code where a command takes it, if you trust whoever wrote this store"
        )
    # The device is this machine's affair, not the run's.
    options = {name: value for name, value in config.options.items() if name != "device"}
    return config, POLICIES.build(config.family, model=config.model, **options)


def check_files(run: Mapping[str, Any], config: PolicyConfig, policy: Policy) -> None:
    """Raise StoreError when the files of a model are not those that the run began with."""
    if policy.model_id != (began := run.get("model_id", policy.model_id)):
        raise StoreError(
            f"the files of {config.model!r} changed since run {run['run_id']} began ({began}, now {policy.model_id}): "
            f"restore them"
        )


def _document(store: Store, policy_id: str) -> dict[str, Any]:
    if policy_id == LAST:
        return _newest_average(store)
    found = list(store.documents(f"policies/{checked_name(policy_id, 'policy_id')}*/policy.json"))
    if len(found) != 1:
        several = ", ".join(document["policy_id"] for document in found)
        said = f"several policies begin with {policy_id}: {several}" if found else f"the store has no policy {policy_id}"
        raise StoreError(f"{said}: see the view policies of `opgrpo sql`")
    return found[0]


def _newest_average(store: Store) -> dict[str, Any]:
    # By the weights, which averages alone have: one that is the trained policy, or still the base, is registered as that.
    kept = {path.split("/")[1] for path in store.directory.list("policies/*/weights.safetensors")}
    averages = [document for document in store.documents("policies/*/policy.json") if document["policy_id"] in kept]
    if not averages:
        raise StoreError("the store has no averaged policy yet: finish a run, or name a policy of the view policies")
    newest = max(averages, key=lambda document: datetime.fromisoformat(document["created_at"]))
    return max((a for a in averages if a["run_id"] == newest["run_id"]), key=lambda document: int(document["iteration"]))


def _weights(store: Store, document: dict[str, Any]) -> dict[str, Any] | None:
    """The trainable weights of a policy; None for a base policy, whose model has them."""
    if document["kind"] == "base":
        return None
    path = f"policies/{document['policy_id']}/weights.safetensors"
    if store.directory.exists(path):
        return weights.from_bytes(store.directory.read(path), path)
    if not store.directory.list(f"states/run={document['run_id']}/iter=*/{document['policy_id']}.safetensors"):
        raise StoreError(
            f"the store does not keep the weights of policy {document['policy_id']} (iteration {document['iteration']} of run "
            f"{document['run_id']}). Policies that it has: {', '.join(_available(store)) or 'none'}"
        )
    state = read_state(store, document["run_id"], document["iteration"], document["policy_id"])
    return {name.removeprefix("weights/"): tensor for name, tensor in state.items() if name.startswith("weights/")}


def _available(store: Store) -> list[str]:
    """The policies that can be restored, with their kinds: bases, and those whose weights or training state is kept."""
    files = store.directory.list("policies/*/weights.safetensors") + store.directory.list("states/*/*/*.safetensors")
    kept = {part.removesuffix(".safetensors") for path in files for part in path.split("/")}
    documents = [d for d in store.documents("policies/*/policy.json") if d["kind"] == "base" or d["policy_id"] in kept]
    documents.sort(key=lambda document: (document["run_id"], int(document["iteration"]), document["policy_id"]))
    return [f"{document['policy_id']} ({document['kind']}, iteration {document['iteration']})" for document in documents]
