"""The command line: parse, build the config, call a stage, print its result, exit. Heavy imports happen inside commands."""

from __future__ import annotations

import errno
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from opgrpo_data.store import Store
    from pipelines.experiment import Experiment

app = typer.Typer(
    help="Off-policy GRPO for flow-matching models over a store of trajectories that you can query with SQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

store_app = typer.Typer(help="Look into a store.", no_args_is_help=True)
app.add_typer(store_app, name="store")

DEFAULT_STORE = "opgrpo-store"
QUICKSTART = Path(__file__).parent / "pipelines" / "embedded" / "quickstart.yaml"

ConfigPath = Annotated[Path, typer.Argument(help="the run's YAML file, for example examples/quickstart.yaml")]
StoreUrl = Annotated[str, typer.Option("--store", envvar="OPGRPO_STORE", help="directory or bucket prefix of the store")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override a setting, for example train.lr=1e-4")]
ImportBuffer = Annotated[
    str | None, typer.Option(help="start from the replay buffers of another store; the same as --set replay.import_buffer=...")
]
POLICY_HELP = "policy_id, the beginning of it, or `last`: the last average of the newest run"
PolicyId = Annotated[str, typer.Option("--policy", help=POLICY_HELP)]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="run Python code that the store names as the policy's family")]
DatasetForm = Literal["webdataset", "huggingface", "preferences", "sft"]
Iteration = Annotated[int | None, typer.Option(min=0, help="which iteration; by default the one the run is in")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress on stderr")]

_REMEDIES = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), ": make room and run the same command again; what was committed is kept"
)


class UsageError(ValueError):
    """Options that do not go together."""


@contextmanager
def _errors() -> Iterator[None]:
    """What users and disks do wrong is one line: exit code 2 for usage and config, else 1. Our own bugs keep their trace."""
    from pipelines.config import ConfigError

    try:
        yield
    except BrokenPipeError:
        raise  # `opgrpo ... | head`: Typer ends quietly
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}{_REMEDIES.get(getattr(error, 'errno', 0), '')}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError | UsageError) else 1) from error


def _tells(command: Callable[..., Any]) -> Callable[..., None]:
    """A command that returns what it has to tell, an object or rows: it takes --json too, and its errors are one line."""

    @wraps(command)
    def tell(*, as_json: bool, **given: Any) -> None:
        with _errors():
            from pipelines.console import show

            show(command(**given), as_json)

    own = inspect.signature(command, eval_str=True)
    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    tell.__signature__ = own.replace(parameters=[*own.parameters.values(), as_json])  # type: ignore[attr-defined]
    return tell


def _open(url: str) -> Store:
    from opgrpo_data.store import Store

    return Store.open(url)


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--options is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise UsageError(f"--options must be a JSON object, got {text!r}")
    return options


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
    "select",
    "pipelines.selection:select",
    _current,
    "Choose the replay buffer, and plan the training iteration: advantages, importance weights, batches.",
)
_stage(
    "eval",
    "pipelines.evaluation:evaluate",
    _trained,
    "Measure the held-out reward of the averaged policy at the start of an iteration, and keep that policy.",
)


@app.command()
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
    with _errors():
        from pipelines.console import show_outcome

        if reward is not None:
            from pipelines.progress import Progress
            from pipelines.rescore import rescore
            from pipelines.settings import RewardConfig

            if config is not None or iteration is not None or overrides:
                raise UsageError("--reward scores stored trajectories of any run: it goes with --run, not with a CONFIG")
            asked = RewardConfig(name=reward, options=_options(options))
            outcome = rescore(_open(store), asked, run=run, dry_run=dry_run, progress=Progress(quiet))
        elif config is None or run is not None:
            raise UsageError("give the run's CONFIG, or --reward NAME (and perhaps --run) to score stored trajectories anew")
        else:
            from pipelines.score import score

            outcome = score(_experiment(config, store, overrides, quiet), iteration, dry_run)
        show_outcome(outcome, dry_run, as_json)


@app.command()
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
    with _errors():
        if offline:
            if iteration is not None:
                raise UsageError("--offline trains all iterations: leave --iteration away")
            _run(config, store, [*(overrides or ()), "algorithm=offline"], dry_run, as_json, quiet)
            return
        from pipelines.console import show_outcome
        from pipelines.train import train

        experiment = _experiment(config, store, overrides, quiet)
        show_outcome(train(experiment, _planned(experiment, iteration), dry_run), dry_run, as_json)


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
@_tells
def sql(
    query: Annotated[str, typer.Argument(help="one SELECT over prompts, policies, runs, trajectories, rewards, buffer, ...")],
    store: StoreUrl = DEFAULT_STORE,
    allow_external: Annotated[bool, typer.Option(help="let the query read other files, and the network")] = False,
) -> Any:
    """Ask the store anything, read-only. `SHOW TABLES` and `DESCRIBE trajectories` tell what there is."""
    from opgrpo_data.catalog import Catalog

    return Catalog(_open(store), allow_external=allow_external).query(query).to_pylist()


@app.command()
@_tells
def sample(
    prompts: Annotated[list[str], typer.Argument(help="what to draw")],
    policy: PolicyId,
    store: StoreUrl = DEFAULT_STORE,
    to: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("samples"),
    count: Annotated[int, typer.Option(min=1, help="samples of each prompt")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="denoising steps")] = 28,
    seed: Annotated[int, typer.Option(min=0, help="of the noise: the same for every policy")] = 0,
    trust_code: TrustCode = False,
) -> Any:
    """Draw pictures (or videos) with a policy of the store."""
    from pipelines.sample import sample

    options: dict[str, Any] = {"count": count, "num_steps": steps, "seed": seed, "trust_code": trust_code}
    return [str(path) for path in sample(_open(store), policy, prompts, to, **options)]


@app.command()
@_tells
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
        return export(_open(store), policy, Path(to), trust_code=trust_code)
    from opgrpo_data.exchange import export_dataset

    return export_dataset(_open(store), to, str(form), reward=reward, where=where)


@app.command(name="import")
@_tells
def import_(
    source: Annotated[str, typer.Argument(help="another store, or a dataset that `opgrpo export` wrote with its latents")],
    store: StoreUrl = DEFAULT_STORE,
    merge: Annotated[bool, typer.Option("--merge", help="also into a store that holds something already")] = False,
) -> Any:
    """Take over trajectories, rewards and all that is known of them; what is there already is skipped."""
    from opgrpo_data.exchange import import_dataset

    return import_dataset(source, store, merge=merge)


@app.command(name="evaluate-offline")
@_tells
def evaluate_offline(
    policy: Annotated[str, typer.Argument(help=POLICY_HELP)],
    reward: Annotated[str | None, typer.Option(help="which reward; by default the one of the policy's run")] = None,
    run: Annotated[str | None, typer.Option(help="only trajectories of this run")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="only the last so many iterations before the policy")] = None,
    store: StoreUrl = DEFAULT_STORE,
    trust_code: TrustCode = False,
) -> Any:
    """Estimate a policy's reward from stored trajectories alone, and say how far that can be trusted."""
    from pipelines.offline_evaluation import evaluate_offline

    options: dict[str, Any] = {"reward": reward, "run": run, "iterations": last, "trust_code": trust_code}
    return asdict(evaluate_offline(_open(store), policy, **options))


@app.command()
def verify(
    store: StoreUrl = DEFAULT_STORE,
    deep: Annotated[bool, typer.Option("--deep", help="read every byte, not only indexes and sizes")] = False,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="bar damaged trajectories from buffers and plans")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look for anything in the store that is not as it was written. Exit code 1 when something is wrong."""
    with _errors():
        from opgrpo_data.upkeep.verify import verify
        from pipelines.console import show_report
        from pipelines.progress import Progress

        report = verify(_open(store), deep=deep, quarantine=quarantine, bar=Progress(quiet).bar)
        show_report(report, as_json)
        if report.findings:
            raise typer.Exit(1)


@app.command()
@_tells
def gc(
    store: StoreUrl = DEFAULT_STORE,
    delete: Annotated[bool, typer.Option("--delete", help="really remove it; without, only say what would be")] = False,
    grace_hours: Annotated[float, typer.Option(min=0, max=1e6, help="leave what is younger: it may be under way")] = 24,
    keep_iterations: Annotated[
        int | None, typer.Option(min=1, help="drop latents and media that no buffer, plan or pin of so many iterations holds")
    ] = None,
) -> Any:
    """Remove what killed commands left behind, and, if asked, the bytes of trajectories that nothing needs any more."""
    from opgrpo_data.upkeep.garbage import collect

    grace = timedelta(hours=grace_hours)
    return asdict(collect(_open(store), delete=delete, grace=grace, keep_iterations=keep_iterations))


@app.command()
@_tells
def compact(store: StoreUrl = DEFAULT_STORE, dry_run: DryRun = False) -> Any:
    """Merge many small index files into a few large ones that SQL reads faster. Tars are not touched."""
    from opgrpo_data.upkeep.compaction import compact

    return compact(_open(store), dry_run=dry_run)


@app.command()
@_tells
def pin(
    run: Annotated[str, typer.Argument(help="run_id")],
    store: StoreUrl = DEFAULT_STORE,
    remove: Annotated[bool, typer.Option("--remove", help="take the pin away")] = False,
) -> Any:
    """Keep all trajectories of a run, and all that its buffers and plans use, from `opgrpo gc`."""
    opened = _open(store)
    (opened.unpin if remove else opened.pin)(run)
    return {"pinned": sorted(opened.pins())}


@app.command()
@_tells
def migrate(store: StoreUrl = DEFAULT_STORE, dry_run: DryRun = False) -> Any:
    """Raise a store to the present format version. Older software cannot open it afterwards."""
    from opgrpo_data.upkeep.migrate import migrate

    return migrate(store, dry_run=dry_run)


@store_app.command(name="ls")
@_tells
def store_ls(store: StoreUrl = DEFAULT_STORE) -> Any:
    """The runs of the store: iterations, trajectories, bytes, rewards, policies."""
    from opgrpo_data.exchange import listing

    return listing(_open(store))


@store_app.command(name="show")
@_tells
def store_show(
    trajectory: Annotated[str, typer.Argument(help="trajectory_id, the beginning of it, or `best`")],
    store: StoreUrl = DEFAULT_STORE,
    to: Annotated[Path | None, typer.Option(help="a PNG with its pictures through the denoising")] = None,
) -> Any:
    """One trajectory: prompt, lineage, rewards, and what training did with it."""
    from pipelines.show import show

    return show(_open(store), trajectory, to)


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

        serve(name, _options(options), host, port, token_variable)


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
