"""Commands that make a run: its stages one by one, or all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.shared import (
    DEFAULT_STORE,
    ConfigPath,
    DryRun,
    Json,
    Overrides,
    Quiet,
    StoreUrl,
    UsageError,
    one_line_each,
    open_experiment,
    open_store,
    parse_options,
)

if TYPE_CHECKING:
    from pipelines.experiment import Experiment

QUICKSTART = Path(__file__).parents[1] / "embedded" / "quickstart.yaml"

ImportBuffer = Annotated[
    str | None, typer.Option(help="start from the replay buffers of another store; the same as --set replay.import_buffer=...")
]
Iteration = Annotated[int | None, typer.Option(min=0, help="which iteration; by default the one the run is in")]


def init(
    config: ConfigPath,
    store: StoreUrl = DEFAULT_STORE,
    import_buffer: ImportBuffer = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make the store where there is none, and register the prompts, the run and its base policy in it."""
    overrides = _importing(overrides, import_buffer)
    with one_line_each():
        if dry_run:
            from opgrpo_data.io import Directory
            from pipelines.config import load_config

            told = {"store": Directory(store).url, "run_id": load_config(config, overrides or ()).run_id}
            said = f"would register run {told['run_id']} in store {told['store']}"
        else:
            experiment = open_experiment(config, store, overrides, quiet=True, init=True)
            told = {"store": experiment.store.directory.url, "run_id": experiment.run_id}
            said = f"run {told['run_id']} is in store {told['store']}"
        typer.echo(json.dumps(told) if as_json else said)


def _importing(overrides: list[str] | None, import_buffer: str | None) -> list[str]:
    return [*(overrides or ()), *([] if import_buffer is None else [f"replay.import_buffer={json.dumps(import_buffer)}"])]


def _stage(path: str, which: Callable[[Experiment, int | None], int | None], summary: str) -> Callable[..., None]:
    """Make the command of one stage: every stage takes an experiment, an iteration and dry_run, and gives an Outcome."""

    def command(
        config: ConfigPath,
        store: StoreUrl = DEFAULT_STORE,
        iteration: Iteration = None,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        with one_line_each():
            from pipelines.console import show_outcome

            module, _, function = path.partition(":")
            experiment = open_experiment(config, store, overrides, quiet)
            outcome = getattr(import_module(module), function)(experiment, which(experiment, iteration), dry_run)
            show_outcome(outcome, dry_run, as_json)

    command.__doc__ = summary
    return command


def _current(experiment: Experiment, iteration: int | None) -> int:
    """The iteration the run is in; of a finished run the last one, where there is nothing to do."""
    return min(experiment.iteration, experiment.config.iterations - 1) if iteration is None else iteration


def _planned(experiment: Experiment, iteration: int | None) -> int:
    """The iteration to train: the one the run is in, or, where that has no plan yet, the last one, which is done."""
    if iteration is not None:
        return iteration
    current = experiment.iteration
    has_plan = experiment.store.files("plans", run=experiment.run_id, iteration=current)
    return current if has_plan or current == 0 else current - 1


def _trained(experiment: Experiment, iteration: int | None) -> int:
    """The newest policy."""
    return experiment.iteration if iteration is None else iteration


rollout = _stage(
    "pipelines.rollout:rollout",
    _current,
    "Draw the trajectories of an iteration: fresh ones, and continuations of replayed prefixes.",
)
select = _stage(
    "pipelines.selection:select",
    _current,
    "Choose the replay buffer, and plan the training iteration: advantages, importance weights, batches.",
)
evaluate = _stage(
    "pipelines.evaluation:evaluate",
    _trained,
    "Measure the held-out reward of the averaged policy at the start of an iteration, and keep that policy.",
)


def score(
    config: Annotated[Path | None, typer.Argument(help="the run's YAML file; not with --reward")] = None,
    store: StoreUrl = DEFAULT_STORE,
    iteration: Iteration = None,
    reward: Annotated[str | None, typer.Option(help="another reward, for stored trajectories of any run")] = None,
    options: Annotated[str, typer.Option(help="of that reward, as a JSON object")] = "{}",
    run: Annotated[str | None, typer.Option(help="with --reward: only this run's trajectories")] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score what lacks the reward: the trajectories of one iteration, or of the whole run; or, with --reward, of the store."""
    with one_line_each():
        from pipelines.console import show_outcome

        if reward is not None:
            from pipelines.progress import Progress
            from pipelines.rescore import rescore
            from pipelines.settings import RewardConfig

            if config is not None or iteration is not None or overrides:
                raise UsageError("--reward scores stored trajectories of any run: it goes with --run, not with a CONFIG")
            asked = RewardConfig(name=reward, options=parse_options(options))
            outcome = rescore(open_store(store), asked, run=run, dry_run=dry_run, progress=Progress(quiet))
        elif config is None or run is not None:
            raise UsageError("give the run's CONFIG, or --reward NAME (and perhaps --run) to score stored trajectories anew")
        else:
            from pipelines.score import score

            outcome = score(open_experiment(config, store, overrides, quiet), iteration, dry_run)
        show_outcome(outcome, dry_run, as_json)


def train(
    config: ConfigPath,
    store: StoreUrl = DEFAULT_STORE,
    iteration: Iteration = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="all iterations, from trajectories that the store has: --set algorithm=offline")
    ] = False,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Execute the plan of an iteration: a new policy, and a record of what was done with each trajectory."""
    with one_line_each():
        if offline:
            if iteration is not None:
                raise UsageError("--offline trains all iterations: leave --iteration away")
            _run(config, store, [*(overrides or ()), "algorithm=offline"], dry_run, as_json, quiet)
            return
        from pipelines.console import show_outcome
        from pipelines.train import train

        experiment = open_experiment(config, store, overrides, quiet)
        show_outcome(train(experiment, _planned(experiment, iteration), dry_run), dry_run, as_json)


def run(
    config: ConfigPath,
    store: StoreUrl = DEFAULT_STORE,
    import_buffer: ImportBuffer = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """All stages, all iterations, from wherever the run was left; makes the store where there is none."""
    with one_line_each():
        _run(config, store, _importing(overrides, import_buffer), dry_run, as_json, quiet)


def quickstart(
    store: StoreUrl = DEFAULT_STORE,
    seed: Annotated[int | None, typer.Option(min=0, help="of the experiment; by default the config's")] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the embedded text-to-image policy on the embedded world: minutes on a CPU, no network, no key."""
    with one_line_each():
        seeded = [] if seed is None else [f"seed={seed}"]
        _run(QUICKSTART, store, [*(overrides or ()), *seeded], dry_run, as_json, quiet)


def _run(config: Path, store: str, overrides: list[str] | None, dry_run: bool, as_json: bool, quiet: bool) -> None:
    from pipelines.console import show, show_result, to_json
    from pipelines.experiment import trained_iterations

    if dry_run:
        from pipelines.config import load_config
        from pipelines.estimate import estimate

        wanted = load_config(config, overrides or ())
        show(estimate(wanted, trained_iterations(store, wanted)), as_json)
        return
    from pipelines.loop import run

    result = run(open_experiment(config, store, overrides, quiet, init=True))
    if as_json:
        typer.echo(to_json(asdict(result)))
    else:
        show_result(config, overrides or [], result)
