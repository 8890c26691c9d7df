"""Commands that use what a run has come to: draw with a policy, estimate its reward; and offer a reward."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.shared import (
    DEFAULT_STORE,
    POLICY_HELP,
    StoreUrl,
    TrustCode,
    one_line_each,
    open_store,
    parse_options,
    tells,
)

PolicyId = Annotated[str, typer.Option("--policy", help=POLICY_HELP)]


@tells
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
    return [str(path) for path in sample(open_store(store), policy, prompts, to, **options)]


@tells
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
    return asdict(evaluate_offline(open_store(store), policy, **options))


def serve_reward(
    name: Annotated[str, typer.Argument(help="registered reward, or module:attribute of your own")],
    options: Annotated[str, typer.Option(help="passed to the reward's factory, as a JSON object")] = "{}",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    token_variable: Annotated[str | None, typer.Option(help="environment variable with the token that clients send")] = None,
) -> None:
    """Offer a reward to other machines over HTTP, until stopped; there, reward.name is http."""
    with one_line_each():
        from pipelines.reward_server import serve

        serve(name, parse_options(options), host, port, token_variable)
