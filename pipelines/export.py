"""A policy out of the store as files that diffusers loads: a LoRA, or the whole transformer; with a model card."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

import yaml

from opgrpo_data.catalog import Catalog
from opgrpo_data.store import Store
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.restore import Restored, restore

LINEAGE = """
SELECT count(*) AS trajectories, count(parent_id) AS continuations, count(DISTINCT prompt_id) AS prompts
FROM trajectories WHERE run_id = '{run_id}' AND iteration < {iteration}
"""

USE_LORA = """from diffusers import {pipeline}
{where}
pipeline = {pipeline}.from_pretrained({base})
pipeline.load_lora_weights("this folder")
"""

USE_TRANSFORMER = """from diffusers import {pipeline}, {transformer}
{where}
transformer = {transformer}.from_pretrained("this folder", subfolder="transformer")
pipeline = {pipeline}.from_pretrained({base}, transformer=transformer)
"""

CARD = """---
{head}---

# {name}, policy {policy_id}

A {kind} for {base_model}, trained by {algorithm} with the reward `{reward}`.

- run `{run_id}`, seed {seed}, after {iteration} iterations: {made}
- parent policy {parent}, base policy of the run `{base_policy_id}`
- data: {trajectories} trajectories of {prompts} prompts, {continuations} of them continuations of replayed ones
- software: {software}

```python
{use}```

All settings of the run:

```yaml
{config}```
"""


def export(store: Store, policy_id: str, folder: Path, *, trust_code: bool = False) -> dict[str, Any]:
    """Write a policy into a new folder: all of it or nothing. Returns what was written. trust_code: see `restore`.

    Raises ValueError when the folder is there already or lies in the store, or the policy is of a family that is no diffusers
    pipeline.
    """
    store.outside(str(folder))
    taken = ValueError(f"{folder} is there already: choose another folder")
    if folder.exists():
        raise taken
    restored = restore(store, policy_id, trust_code=trust_code)
    if not isinstance(restored.policy, PipelinePolicy):
        raise ValueError(f"policy family {restored.config.family!r} is no diffusers pipeline: it cannot be exported")
    writing = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    writing.mkdir(parents=True)
    try:
        kind = _write_weights(restored.policy, writing)
        (writing / "README.md").write_text(_card(store, restored, restored.policy, kind), encoding="utf-8")
        writing.rename(folder)
    except OSError as error:
        if folder.exists():  # another export was first
            raise taken from error
        raise
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return {"policy_id": restored.document["policy_id"], "kind": kind, "folder": str(folder)}


def _write_weights(policy: PipelinePolicy, folder: Path) -> str:
    transformer = policy.pipeline.transformer
    if policy.adapter is None:
        transformer.save_pretrained(folder / "transformer", safe_serialization=True)
        return "transformer"
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    policy.source.pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        safe_serialization=True,
        # Without this alpha is lost where it differs from the rank, and the adapter comes back with another scale.
        **_collate_lora_metadata({"transformer": transformer}),
    )
    return "lora"


def _card(store: Store, restored: Restored, policy: PipelinePolicy, kind: str) -> str:
    """A model card: what this is made of and how to load it."""
    document, run, config = restored.document, restored.run, restored.run["config"]
    base, parent = document["base_model"], document["parent_id"]
    embedded = base == "embedded"  # no folder that anyone could name: the package has it
    head = ({} if embedded else {"base_model": base}) | {
        "library_name": "diffusers",
        "tags": ["opgrpo", "op-grpo", "flow-matching", kind],
    }
    drawn = LINEAGE.format(run_id=document["run_id"], iteration=int(document["iteration"]))
    lineage = Catalog(store).query(drawn).to_pylist()[0]
    use = (USE_LORA if kind == "lora" else USE_TRANSFORMER).format(
        base=("PIPELINE_DIR" if embedded else repr(base)) + "".join(f", {part}=None" for part in policy.source.absent),
        where="from pipelines.embedded import PIPELINE_DIR\n" if embedded else "",
        pipeline=policy.source.pipeline_class.__name__,
        transformer=type(policy.pipeline.transformer).__name__,
    )
    return CARD.format(
        head=yaml.safe_dump(head, sort_keys=False),
        kind=kind,
        base_model="the tiny pipeline `embedded` that the Python package opgrpo ships" if embedded else f"`{base}`",
        parent="none" if parent is None else f"`{parent}`",
        **{name: document[name] for name in ("policy_id", "run_id", "iteration")},
        made="an average of the run's weights" if document["kind"] == "average" else f"the run's {document['kind']} weights",
        base_policy_id=run["base_policy_id"],
        **{name: config[name] for name in ("name", "algorithm", "seed")},
        reward=config["reward"]["name"],
        **lineage,
        software=", ".join(f"{name} {version}" for name, version in run["software"].items()),
        use=use,
        config=yaml.safe_dump(config, sort_keys=False),
    )
