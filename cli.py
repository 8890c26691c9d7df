"""The command line: parse, build the config, call a stage, print its result, exit. Heavy imports happen inside commands."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.experiment import Experiment

app = typer.Typer(
    help="Off-policy GRPO for flow-matching models over a store of trajectories that you can query with SQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

DEFAULT_STORE = "opgrpo-store"
QUICKSTART = Path(__file__).parent / "pipelines" / "embedded" / "quickstart.yaml"

ConfigPath = Annotated[Path, typer.Argument(help="the run's YAML file, for example examples/quickstart.yaml")]
StoreUrl = Annotated[str, typer.Option("--store", envvar="OPGRPO_STORE", help="directory or bucket prefix of the store")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override a setting, for example train.lr=1e-4")]
ImportBuffer = Annotated[
    str | None, typer.Option(help="start from the replay buffers of another store; the same as --set replay.import_buffer=...")
]
PolicyId = Annotated[
    str, typer.Option("--policy", help="policy_id, the beginning of it, or `last`: the last average of the newest run")
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
            said = f"would register run {told['run_id']} in store {told['store']}"
        else:
            experiment = _experiment(config, store, overrides, quiet=True, init=True)
            told = {"store": experiment.store.directory.url, "run_id": experiment.run_id}
            said = f"run {told['run_id']} is in store {told['store']}"
        typer.echo(json.dumps(told) if as_json else said)


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
            from pipelines.console import show_outcome

            module, _, function = path.partition(":")
            experiment = _experiment(config, store, overrides, quiet)
            outcome = getattr(import_module(module), function)(experiment, which(experiment, iteration), dry_run)
            show_outcome(outcome, dry_run, as_json)


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
        from pipelines.console import show_table, to_json

        rows = Catalog(Store.open(store)).query(query).to_pylist()
        if as_json:
            typer.echo(to_json(rows))
        else:
            show_table(rows)


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="what to draw")],
    policy: PolicyId,
    store: StoreUrl = DEFAULT_STORE,
    to: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("samples"),
    count: Annotated[int, typer.Option(min=1, help="samples of each prompt")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="denoising steps")] = 28,
    seed: Annotated[int, typer.Option(min=0, help="of the noise: the same for every policy")] = 0,
    as_json: Json = False,
) -> None:
    """Draw pictures (or videos) with a policy of the store."""
    with _errors():
        from opgrpo_data.store import Store
        from pipelines.sample import sample

        paths = sample(Store.open(store), policy, prompts, to, count=count, num_steps=steps, seed=seed)
        told = [str(path) for path in paths]
        typer.echo(json.dumps(told) if as_json else "\n".join(told))


@app.command()
def export(
    policy: PolicyId,
    to: Annotated[Path, typer.Option(help="a new folder")],
    store: StoreUrl = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Write a policy as files that diffusers loads (a LoRA, or the whole transformer), with a model card."""
    with _errors():
        from opgrpo_data.store import Store
        from pipelines.console import show
        from pipelines.export import export

        show(export(Store.open(store), policy, to), as_json)


@app.command(name="serve-reward")
def serve_reward(
    name: Annotated[str, typer.Argument(help="registered reward, or module:attribute of your own")],
    options: Annotated[str, typer.Option(help="passed to the reward's factory, as a JSON object")] = "{}",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    token_variable: Annotated[str | None, typer.Option(help="environment variable with the token that clients send")] = None,
) -> None:
    """Offer a reward to other machines over HTTP, until stopped; there, reward.name is http."""
    with _errors():
        from pipelines.reward_server import serve

        serve(name, options, host, port, token_variable)


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

    result = run(_experiment(config, store, overrides, quiet, init=True))
    if as_json:
        typer.echo(to_json(asdict(result)))
    else:
        show_result(config, overrides or [], result)


if __name__ == "__main__":
    app()
