"""What the commands share: options, and how they speak. Errors and warnings are one line each, results text or JSON."""

from __future__ import annotations

import errno
import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from opgrpo_data.store import Store
    from pipelines.experiment import Experiment

DEFAULT_STORE = "opgrpo-store"
POLICY_HELP = "policy_id, the beginning of it, or `last`: the last average of the newest run"

ConfigPath = Annotated[Path, typer.Argument(help="the run's YAML file, for example examples/quickstart.yaml")]
StoreUrl = Annotated[str, typer.Option("--store", envvar="OPGRPO_STORE", help="directory or bucket prefix of the store")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override a setting, for example train.lr=1e-4")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="run Python code that the store names as the policy's family")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress on stderr")]

_REMEDIES = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), ": make room and run the same command again; what was committed is kept"
)


class UsageError(ValueError):
    """Options that do not go together."""


@contextmanager
def one_line_each() -> Iterator[None]:
    """What users and disks do wrong is one line: exit code 2 for usage and config, else 1. Our own bugs keep their trace.

    Python's warnings are a line on stderr, each text once.
    """
    from pipelines.config import ConfigError

    with warnings.catch_warnings():
        warnings.showwarning = _warn_once()
        try:
            yield
        except BrokenPipeError:
            raise  # `opgrpo ... | head`: Typer ends quietly
        except (ValueError, OSError) as error:
            typer.echo(f"error: {_line(error)}{_REMEDIES.get(getattr(error, 'errno', 0), '')}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError | UsageError) else 1) from error


def _warn_once() -> Callable[..., None]:
    told: set[str] = set()

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        if (line := _line(message)) not in told:
            told.add(line)
            typer.echo(f"warning: {line}", err=True)

    return warn


def _line(said: object) -> str:
    return " ".join(str(said).split())


def tells(command: Callable[..., Any]) -> Callable[..., None]:
    """A command that returns what it has to tell, an object or rows: it takes --json too, and its errors are one line."""

    @wraps(command)
    def tell(*, as_json: bool, **given: Any) -> None:
        with one_line_each():
            from pipelines.console import show

            show(command(**given), as_json)

    own = inspect.signature(command, eval_str=True)
    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    tell.__signature__ = own.replace(parameters=[*own.parameters.values(), as_json])  # type: ignore[attr-defined]
    return tell


def open_store(url: str) -> Store:
    """The store of --store."""
    from opgrpo_data.store import Store

    return Store.open(url)


def open_experiment(config: Path, store: str, overrides: list[str] | None, quiet: bool, *, init: bool = False) -> Experiment:
    """The run of CONFIG in the store; with `init`, made where there is none."""
    from pipelines.config import load_config
    from pipelines.experiment import Experiment
    from pipelines.progress import Progress

    bind = Experiment.init if init else Experiment.open
    return bind(store, load_config(config, overrides or ()), Progress(quiet))


def parse_options(text: str) -> dict[str, Any]:
    """The JSON object of --options."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--options is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise UsageError(f"--options must be a JSON object, got {text!r}")
    return options
