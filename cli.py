"""The command line: parse, build the config, call a stage, print its result, exit. Heavy imports happen inside commands."""

from __future__ import annotations

import errno
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipelines.experiment import Experiment, Outcome
    from pipelines.loop import Result

app = typer.Typer(
    help="Off-policy GRPO for flow-matching models over a store of trajectories that you can query with SQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

DEFAULT_STORE = "opgrpo-store"
PIPE_WIDTH = 100_000
LEARNING_CURVE = (
    "SELECT iteration, count(*) AS n, avg(value) AS reward FROM trajectories JOIN rewards USING (trajectory_id) "
    "WHERE {mine} GROUP BY 1 ORDER BY 1"
)
OLDEST_ENTRIES = (
    "SELECT text, decayed_reward, age FROM buffer JOIN prompts USING (prompt_id) "
    "WHERE {mine} AND iteration = {last} ORDER BY age DESC LIMIT 10"
)
QUICKSTART = Path(__file__).parent / "pipelines" / "embedded" / "quickstart.yaml"

ConfigPath = Annotated[Path, typer.Argument(help="the run's YAML file, for example examples/quickstart.yaml")]
StoreUrl = Annotated[str, typer.Option("--store", envvar="OPGRPO_STORE", help="directory or bucket prefix of the store")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override a setting, for example train.lr=1e-4")]
ImportBuffer = Annotated[
    str | None, typer.Option(help="start from the replay buffers of another store; the same as --set replay.import_buffer=...")
]
Iteration = Annotated[int | None, typer.Option(min=0, help="which iteration; by default the one the run is in")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress on stderr")]

_REMEDIES = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), ": make room and run the same command again; what was committed is kept"
)


@contextmanager
def _errors() -> Iterator[None]:
    """What users and disks do wrong is one line: exit code 2 for the config, else 1. Our own bugs keep their trace."""
    from pipelines.config import ConfigError

    try:
        yield
    except BrokenPipeError:
        raise  # `opgrpo ... | head`: Typer ends quietly
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}{_REMEDIES.get(getattr(error, 'errno', 0), '')}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


def _experiment(config: Path, store: str, overrides: list[str] | None, quiet: bool, *, init: bool = False) -> Experiment:
    from pipelines.config import load_config
    from pipelines.experiment import Experiment
    from pipelines.progress import Progress

    bind = Experiment.init if init else Experiment.open
    return bind(store, load_config(config, overrides or ()), Progress(quiet))


def _print_outcome(outcome: Outcome, dry_run: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(_json({**asdict(outcome), "dry_run": dry_run}))
        return
    where = "" if outcome.iteration is None else f" iteration {outcome.iteration}"
    verb = "would do" if dry_run else "done"
    work = f"{verb} {outcome.done}, already there {outcome.skipped}" if outcome.done else "nothing to do"
    told = "".join(f", {name} {value}" for name, value in outcome.detail.items())
    typer.echo(f"{outcome.stage}{where}: {work}{told}")


@app.command()
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
    with _errors():
        if dry_run:
            from pipelines.config import load_config

            told = {"store": store, "run_id": load_config(config, overrides or ()).run_id}
            typer.echo(_json(told) if as_json else f"would register run {told['run_id']} in store {told['store']}")
            return
        experiment = _experiment(config, store, overrides, quiet=True, init=True)
        told = {"store": experiment.store.directory.url, "run_id": experiment.run_id}
        typer.echo(_json(told) if as_json else f"run {told['run_id']} is in store {told['store']}")


def _importing(overrides: list[str] | None, import_buffer: str | None) -> list[str]:
    return [*(overrides or ()), *([] if import_buffer is None else [f"replay.import_buffer={json.dumps(import_buffer)}"])]


def _stage(name: str, path: str, which: Callable[[Experiment, int | None], int | None], summary: str) -> None:
    """Make the command of one stage: every stage takes an experiment, an iteration and dry_run, and gives an Outcome."""

    @app.command(name=name, help=summary)
    def command(
        config: ConfigPath,
        store: StoreUrl = DEFAULT_STORE,
        iteration: Iteration = None,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        with _errors():
            module, _, function = path.partition(":")
            experiment = _experiment(config, store, overrides, quiet)
            outcome = getattr(import_module(module), function)(experiment, which(experiment, iteration), dry_run)
            _print_outcome(outcome, dry_run, as_json)


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


def _given(_: Experiment, iteration: int | None) -> int | None:
    """All of the run unless an iteration is given."""
    return iteration


def _trained(experiment: Experiment, iteration: int | None) -> int:
    """The newest policy."""
    return experiment.iteration if iteration is None else iteration


_stage(
    "rollout",
    "pipelines.rollout:rollout",
    _current,
    "Draw the trajectories of an iteration: fresh ones, and continuations of replayed prefixes.",
)
_stage(
    "score",
    "pipelines.score:score",
    _given,
    "Score what lacks the reward: the trajectories of one iteration, or of the whole run.",
)
_stage(
    "select",
    "pipelines.selection:select",
    _current,
    "Choose the replay buffer, and plan the training iteration: advantages, importance weights, batches.",
)
_stage(
    "train",
    "pipelines.train:train",
    _planned,
    "Execute the plan of an iteration: a new policy, and a record of what was done with each trajectory.",
)
_stage(
    "eval",
    "pipelines.evaluation:evaluate",
    _trained,
    "Measure the held-out reward of the averaged policy at the start of an iteration, and keep that policy.",
)


@app.command()
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
    with _errors():
        _run(config, store, _importing(overrides, import_buffer), dry_run, as_json, quiet)


@app.command()
def quickstart(
    store: StoreUrl = DEFAULT_STORE,
    seed: Annotated[int | None, typer.Option(min=0, help="of the experiment; by default the config's")] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the embedded text-to-image policy on the embedded world: minutes on a CPU, no network, no key."""
    with _errors():
        seeded = [] if seed is None else [f"seed={seed}"]
        _run(QUICKSTART, store, [*(overrides or ()), *seeded], dry_run, as_json, quiet)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="one SELECT over prompts, policies, runs, trajectories, rewards, buffer, ...")],
    store: StoreUrl = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Ask the store anything, read-only. `SHOW TABLES` and `DESCRIBE trajectories` tell what there is."""
    with _errors():
        from opgrpo_data.catalog import Catalog
        from opgrpo_data.store import Store

        rows = Catalog(Store.open(store)).query(query).to_pylist()
        if as_json:
            typer.echo(_json(rows))
        else:
            _print_table(rows)


def _run(config: Path, store: str, overrides: list[str] | None, dry_run: bool, as_json: bool, quiet: bool) -> None:
    from pipelines.experiment import trained_iterations
    from pipelines.loop import estimate, run

    if dry_run:
        from pipelines.config import load_config

        wanted = load_config(config, overrides or ())
        told: dict[str, Any] = estimate(wanted, trained_iterations(store, wanted))
        typer.echo(_json(told) if as_json else "\n".join(f"{name}: {value}" for name, value in told.items()))
        return
    result = run(_experiment(config, store, overrides, quiet, init=True))
    if as_json:
        typer.echo(_json(asdict(result)))
    else:
        _print_result(config, overrides or [], result)


def _print_result(config: Path, overrides: list[str], result: Result) -> None:
    """Before and after, where things lie, and three commands to go on with, ready to be pasted into a shell."""
    if result.held_out_before is not None and result.held_out_after is not None:
        gain = result.held_out_after - result.held_out_before
        typer.echo(
            f"\nheld-out reward before {result.held_out_before:.3f}, after {result.held_out_after:.3f} "
            f"({gain:+.3f} ± {result.gain_error:.3f}, {result.samples} samples)\n"
            f"pictures before and after: {result.picture}"
        )
    typer.echo(f"store: {result.store} (run {result.run_id}, policy {result.policy_id})\ngo on with:")
    mine, last = f"run_id = '{result.run_id}'", result.iterations - 1
    longer = [*(part for override in overrides for part in ("--set", override)), "--set", f"iterations={2 * result.iterations}"]
    for command in (
        ["opgrpo", "sql", "--store", result.store, LEARNING_CURVE.format(mine=mine)],
        ["opgrpo", "sql", "--store", result.store, OLDEST_ENTRIES.format(mine=mine, last=last)],
        ["opgrpo", "run", str(config), "--store", result.store, *longer],
    ):
        typer.echo(f"  {' '.join(map(_quoted, command))}")


def _quoted(word: str) -> str:
    """The word for a shell: in double quotes where those are legible and safe, which shlex never uses."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*(rows[0] if rows else ["no rows"]))
    for row in rows:
        table.add_row(*(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()))
    # Into a pipe nothing is cut: the reader there has no narrow window.
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table, markup=False)


def _json(value: Any) -> str:
    """One line of valid JSON."""
    return json.dumps(_plain(value), default=str, allow_nan=False)


def _plain(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    app()
