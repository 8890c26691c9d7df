"""Commands that carry things out of a store, and into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipelines.commands.shared import DEFAULT_STORE, POLICY_HELP, StoreUrl, TrustCode, UsageError, open_store, tells

DatasetForm = Literal["webdataset", "huggingface", "preferences", "sft"]


@tells
def export(
    to: Annotated[str, typer.Option(help="a new folder, or for trajectories also a bucket prefix")],
    policy: Annotated[str | None, typer.Option(help=POLICY_HELP)] = None,
    form: Annotated[DatasetForm | None, typer.Option("--as", help="trajectories as a dataset of this form")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition on the trajectories, for example value > 0.5")] = None,
    reward: Annotated[str | None, typer.Option(help="the reward that `value` means, where there are several")] = None,
    store: StoreUrl = DEFAULT_STORE,
    trust_code: TrustCode = False,
) -> Any:
    """Write a policy as files that diffusers loads, with a model card; or trajectories as a dataset that other tools read."""
    if (policy is None) == (form is None):
        raise UsageError("give either --policy (what to write as a model) or --as (the form of the dataset to write)")
    if policy is not None:
        from pipelines.export import export

        if where is not None or reward is not None:
            raise UsageError("--where and --reward choose trajectories: they go with --as, not with --policy")
        if "://" in to:
            raise UsageError(f"a policy is written into a folder, got --to {to}: write it to a local one, and copy that")
        return export(open_store(store), policy, Path(to), trust_code=trust_code)
    from opgrpo_data.exchange import export_dataset

    return export_dataset(open_store(store), to, str(form), reward=reward, where=where)


@tells
def import_(
    source: Annotated[str, typer.Argument(help="another store, or a dataset that `opgrpo export` wrote with its latents")],
    store: StoreUrl = DEFAULT_STORE,
    merge: Annotated[bool, typer.Option("--merge", help="also into a store that holds something already")] = False,
) -> Any:
    """Take over trajectories, rewards and all that is known of them; what is there already is skipped."""
    from opgrpo_data.exchange import import_dataset

    return import_dataset(source, store, merge=merge)
