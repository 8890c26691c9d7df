"""The command line: the commands of pipelines/commands, put together."""

from __future__ import annotations

import typer

from pipelines.commands import exchange, policies, stages, stores

app = typer.Typer(
    help="Off-policy GRPO for flow-matching models over a store of trajectories that you can query with SQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# In the order of `opgrpo --help`.
app.command("init")(stages.init)
app.command("rollout")(stages.rollout)
app.command("select")(stages.select)
app.command("eval")(stages.evaluate)
app.command("score")(stages.score)
app.command("train")(stages.train)
app.command("run")(stages.run)
app.command("quickstart")(stages.quickstart)
app.command("sql")(stores.sql)
app.command("sample")(policies.sample)
app.command("export")(exchange.export)
app.command("import")(exchange.import_)
app.command("evaluate-offline")(policies.evaluate_offline)
app.command("verify")(stores.verify)
app.command("gc")(stores.gc)
app.command("compact")(stores.compact)
app.command("pin")(stores.pin)
app.command("migrate")(stores.migrate)
app.command("serve-reward")(policies.serve_reward)

store_app = typer.Typer(help="Look into a store.", no_args_is_help=True)
store_app.command("ls")(stores.store_ls)
store_app.command("show")(stores.store_show)
app.add_typer(store_app, name="store")

if __name__ == "__main__":
    app()
