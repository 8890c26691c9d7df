"""Commands about a store: ask it, look into it, keep it whole, fast and small."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.shared import DEFAULT_STORE, DryRun, Json, Quiet, StoreUrl, one_line_each, open_store, tells

GraceHours = Annotated[
    float,
    typer.Option(
        min=0,
        max=1e6,
        help="leave what is younger: it may be under way. With 0, files of commands that are running now are removed too, "
        "and these commands then stop; nothing committed is lost",
    ),
]


@tells
def sql(
    query: Annotated[str, typer.Argument(help="one SELECT over prompts, policies, runs, trajectories, rewards, buffer, ...")],
    store: StoreUrl = DEFAULT_STORE,
    allow_external: Annotated[bool, typer.Option(help="let the query read other files, and the network")] = False,
) -> Any:
    """Ask the store anything, read-only. `SHOW TABLES` and `DESCRIBE trajectories` tell what there is."""
    from opgrpo_data.catalog import Catalog

    found = Catalog(open_store(store), allow_external=allow_external).query(query)
    try:
        return found.to_pylist()
    except OverflowError as error:
        raise ValueError(
            f"a time in the answer is outside the years 1 to 9999 ({error}): ask for it as column::VARCHAR"
        ) from error


def verify(
    store: StoreUrl = DEFAULT_STORE,
    deep: Annotated[bool, typer.Option("--deep", help="read every byte, not only indexes and sizes")] = False,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="bar damaged trajectories from buffers and plans")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look for anything in the store that is not as it was written. Exit code 1 when something is wrong."""
    with one_line_each():
        from opgrpo_data.upkeep.verify import verify
        from pipelines.console import show_report
        from pipelines.progress import Progress

        report = verify(open_store(store), deep=deep, quarantine=quarantine, bar=Progress(quiet).bar)
        show_report(report, as_json)
        if report.findings:
            raise typer.Exit(1)


@tells
def gc(
    store: StoreUrl = DEFAULT_STORE,
    delete: Annotated[bool, typer.Option("--delete", help="really remove it; without, only say what would be")] = False,
    grace_hours: GraceHours = 24,
    keep_iterations: Annotated[
        int | None, typer.Option(min=1, help="drop latents and media that no buffer, plan or pin of so many iterations holds")
    ] = None,
) -> Any:
    """Remove what killed commands left behind, and, if asked, the bytes of trajectories that nothing needs any more."""
    from opgrpo_data.upkeep.garbage import collect

    grace = timedelta(hours=grace_hours)
    return asdict(collect(open_store(store), delete=delete, grace=grace, keep_iterations=keep_iterations))


@tells
def compact(store: StoreUrl = DEFAULT_STORE, dry_run: DryRun = False) -> Any:
    """Merge many small index files into a few large ones that SQL reads faster. Tars are not touched."""
    from opgrpo_data.upkeep.compaction import compact

    return compact(open_store(store), dry_run=dry_run)


@tells
def pin(
    run: Annotated[str, typer.Argument(help="run_id")],
    store: StoreUrl = DEFAULT_STORE,
    remove: Annotated[bool, typer.Option("--remove", help="take the pin away")] = False,
) -> Any:
    """Keep all trajectories of a run, and all that its buffers and plans use, from `opgrpo gc`."""
    opened = open_store(store)
    (opened.unpin if remove else opened.pin)(run)
    return {"pinned": sorted(opened.pins())}


@tells
def migrate(store: StoreUrl = DEFAULT_STORE, dry_run: DryRun = False) -> Any:
    """Raise a store to the present format version. Older software cannot open it afterwards."""
    from opgrpo_data.upkeep.migrate import migrate

    return migrate(store, dry_run=dry_run)


@tells
def store_ls(store: StoreUrl = DEFAULT_STORE) -> Any:
    """The runs of the store: iterations, trajectories, bytes, rewards, policies."""
    from opgrpo_data.exchange import listing

    return listing(open_store(store))


@tells
def store_show(
    trajectory: Annotated[str, typer.Argument(help="trajectory_id, the beginning of it, or `best`")],
    store: StoreUrl = DEFAULT_STORE,
    to: Annotated[Path | None, typer.Option(help="a PNG with its pictures through the denoising")] = None,
) -> Any:
    """One trajectory: prompt, lineage, rewards, and what training did with it."""
    from pipelines.show import show

    return show(open_store(store), trajectory, to)
