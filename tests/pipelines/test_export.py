"""Exported policies: diffusers loads them, they are the policy to the last bit, and their card tells where they are from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import StoreError
from pipelines import export as module
from pipelines import sampler
from pipelines.embedded import PIPELINE_DIR
from pipelines.evaluation import Sample, draw_samples
from pipelines.experiment import Experiment
from pipelines.export import export
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.policies.sd3 import load
from pipelines.prompts import Prompt
from pipelines.restore import restore
from tests.integration.harness import opgrpo, opgrpo_json
from tests.pipelines.helpers import created, forked, small

pytestmark = pytest.mark.usefixtures("on_cpu")

Trained = Callable[[str], Experiment]
TEXTS = ["a red circle", "two blue squares"]


@torch.no_grad()
def _velocities(policy: PipelinePolicy, transformer: Any) -> tuple[Tensor, Tensor]:
    """The policy's, and those of another transformer with the same inputs."""
    condition, sigmas = policy.encode(TEXTS), torch.tensor([0.9, 0.3]).double()
    latents = sampler.batch_noise(range(2), -1, policy.latent_shape, policy.device)
    theirs = transformer(
        hidden_states=latents.to(policy.dtype),
        timestep=(sigmas * 1000).float(),
        encoder_hidden_states=condition["embeds"],
        pooled_projections=condition["pooled"],
        return_dict=False,
    )[0]
    return policy.velocity(latents, sigmas, condition), theirs.float()


def _restored(experiment: Experiment, policy_id: str = "last") -> PipelinePolicy:
    policy = restore(experiment.store, policy_id).policy
    assert isinstance(policy, PipelinePolicy)
    return policy


def _card(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any], str]:
    """The head, the text, the settings and the code of a model card."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    code = text.partition("```python\n")[2].partition("```")[0]
    settings = text.partition("```yaml\n")[2].partition("```")[0]
    return yaml.safe_load(head), text, yaml.safe_load(settings), code


def _run(code: str, folder: Path) -> Any:
    """The pipeline that the code of a card makes."""
    names: dict[str, Any] = {}
    exec(code.replace('"this folder"', repr(str(folder))), names)
    return names["pipeline"]


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_diffusers_loads_the_policy_to_the_last_bit(trained: Trained, kind: str, tmp_path: Path) -> None:
    """By the code in its card. The adapter's alpha is not its rank."""
    experiment, folder = trained(kind), tmp_path / "out"
    told = export(experiment.store, "last", folder)
    assert told == {"policy_id": experiment.learner(1).average_id, "kind": _kind(kind), "folder": str(folder)}
    pipeline = _run(_card(folder)[3], folder)
    policy = _restored(experiment)
    ours, theirs = _velocities(policy, pipeline.transformer)
    assert torch.equal(ours, theirs)
    base, _ = _velocities(load("embedded", device="cpu"), pipeline.transformer)
    assert float((ours - base).abs().max()) > 0.01


def _kind(kind: str) -> str:
    return "lora" if kind.startswith("adapter") else "transformer"


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_its_pictures_are_the_pipelines(trained: Trained, kind: str, tmp_path: Path) -> None:
    experiment, folder = trained(kind), tmp_path / "out"
    export(experiment.store, "last", folder)
    pipeline, policy = _run(_card(folder)[3], folder), _restored(experiment)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [3, 4]
    drawn = draw_samples(policy, [Sample(Prompt(text, {}), 0, seed) for text, seed in zip(TEXTS, seeds, strict=True)], 4)
    start = sampler.batch_noise(seeds, -1, policy.latent_shape, policy.device)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 0, "output_type": "np"}
    shown = pipeline(TEXTS, latents=start, **options).images
    assert np.abs(np.stack(drawn).astype(int) - (shown * 255).round()).max() <= 1


@pytest.mark.parametrize(("kind", "tolerance"), [("adapter, bfloat16", 0.1), ("whole, bfloat16", 0.0)])
def test_a_bfloat16_policy(trained: Trained, kind: str, tolerance: float, tmp_path: Path) -> None:
    """The whole transformer is the same. diffusers rounds a float32 adapter to the pipeline's bfloat16: a few of its roundings,
    which are 0.03 at velocities of 4 to 8."""
    experiment, folder = trained(kind), tmp_path / "out"
    export(experiment.store, "last", folder)
    policy = _restored(experiment)
    pipeline = _run(
        "import torch\n" + re.sub(r"(from_pretrained\(.*)\)", r"\1, dtype=torch.bfloat16)", _card(folder)[3]), folder
    )
    ours, theirs = _velocities(policy, pipeline.transformer)
    assert float((ours - theirs).abs().max()) <= tolerance
    adapter = {parameter.dtype for name, parameter in pipeline.transformer.named_parameters() if ".lora_" in name}
    assert adapter == ({torch.bfloat16} if kind.startswith("adapter") else set())
    if kind.startswith("adapter"):  # in a float32 pipeline the adapter is exact, and what it is added to is not rounded
        whole = _run(_card(folder)[3], folder).transformer
        assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
        assert float((_velocities(load("embedded", device="cpu"), whole)[1] - ours).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", ["base", "trained"])
def test_other_policies_of_the_run(trained: Trained, kind: str, tmp_path: Path) -> None:
    experiment = trained("adapter")
    documents = experiment.store.documents("policies/*/policy.json")
    policy_id = next(document["policy_id"] for document in documents if document["kind"] == kind)
    export(experiment.store, policy_id[:8], tmp_path / "out")
    ours, theirs = _velocities(_restored(experiment, policy_id), _run(_card(tmp_path / "out")[3], tmp_path / "out").transformer)
    assert torch.equal(ours, theirs)
    assert f"the run's {kind} weights" in _card(tmp_path / "out")[1]


# -- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_tells_what_it_is_made_of(trained: Trained, tmp_path: Path) -> None:
    experiment = trained("adapter")
    policy_id = export(experiment.store, "last", tmp_path / "out")["policy_id"]
    head, text, settings, _ = _card(tmp_path / "out")
    assert head == {"library_name": "diffusers", "tags": ["opgrpo", "op-grpo", "flow-matching", "lora"]}
    assert settings == experiment.config.model_dump(mode="json")
    document = experiment.document
    query = "SELECT count(*) AS n, count(parent_id) AS k, count(DISTINCT prompt_id) AS p FROM trajectories"
    (counts,) = Catalog(experiment.store).query(query).to_pylist()
    assert counts == {"n": 8, "k": 0, "p": 2}
    for said in (
        f"# small, policy {policy_id}",
        "A lora for the tiny pipeline `embedded` that the Python package opgrpo ships, trained by op_grpo with the reward "
        "`tests.pipelines.bad_rewards:moody`.",
        f"- run `{experiment.run_id}`, seed 0, after 1 iterations: an average of the run's weights",
        f"- parent policy `{experiment.learner(1).policy_id}`, base policy of the run `{document['base_policy_id']}`",
        "- data: 8 trajectories of 2 prompts, 0 of them continuations of replayed ones",
        f"torch {torch.__version__}, diffusers ",
    ):
        assert said in text


def test_lineage_is_that_of_the_policy_and_its_run(replayed: Path, tmp_path: Path) -> None:
    """Three iterations were rolled out, two trained: what the policy never saw is not counted, nor is another run."""
    experiment = forked(replayed, tmp_path)
    for iteration, told in ((0, "0 trajectories of 0 prompts, 0 of"), (1, "8 trajectories of 2"), (2, "16 trajectories of 4")):
        learner = experiment.learner(iteration)
        export(experiment.store, learner.policy_id, tmp_path / str(iteration), trust_code=True)
        assert f"- data: {told}" in _card(tmp_path / str(iteration))[1]
    assert "- parent policy none, base policy" in _card(tmp_path / "0")[1]


def test_the_card_of_a_model_in_a_folder_names_the_folder(tmp_path: Path) -> None:
    """Its missing T5 encoder is told to diffusers, too; the base policy can be exported as soon as the run is there."""
    model = tmp_path / "it's a model"
    shutil.copytree(PIPELINE_DIR, model)
    policy = {"family": "sd3", "model": str(model), "options": {"device": "cpu", "max_sequence_length": 0}}
    experiment = created(tmp_path, small(policy=policy))
    export(experiment.store, experiment.document["base_policy_id"], tmp_path / "out")
    head, text, _, code = _card(tmp_path / "out")
    assert head["base_model"] == str(model)
    assert f"A transformer for `{model}`, trained by" in text
    ours, theirs = _velocities(load("embedded", device="cpu"), _run(code, tmp_path / "out").transformer)
    assert torch.equal(ours, theirs)


# -- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a folder", "an empty folder", "a file"])
def test_what_is_there_is_left_alone(trained: Trained, what: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if what == "a file":
        target.write_text("mine")
    else:
        target.mkdir()
        if what == "a folder":
            (target / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"^{target} is there already: choose another folder$"):
        export(trained("adapter").store, "last", target)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("where", "error"), [("_write_weights", OSError("no space left on device")), ("_card", KeyboardInterrupt())]
)
def test_a_failure_leaves_nothing(
    trained: Trained, where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(module, where)

    def fail(*arguments: Any) -> None:
        whole(*arguments)
        assert not (tmp_path / "out").exists()
        raise error

    monkeypatch.setattr(module, where, fail)
    with pytest.raises(type(error)):
        export(trained("adapter").store, "last", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    export(trained("adapter").store, "last", tmp_path / "deep" / "out")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


class Wrapped:
    """A policy of someone's own: the embedded one behind another class."""

    def __init__(self) -> None:
        self._policy = load("embedded", device="cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


def wrapped(model: str) -> Wrapped:
    """The factory."""
    return Wrapped()


def test_a_policy_that_is_no_pipeline(tmp_path: Path) -> None:
    experiment = created(tmp_path, small(policy={"family": "tests.pipelines.test_export:wrapped"}))
    told = "^policy family 'tests.pipelines.test_export:wrapped' is no diffusers pipeline: it cannot be exported$"
    with pytest.raises(ValueError, match=told):
        export(experiment.store, experiment.document["base_policy_id"], tmp_path / "out", trust_code=True)
    assert not (tmp_path / "out").exists()


def test_code_that_the_store_names_is_not_run_unasked(tmp_path: Path) -> None:
    experiment = created(tmp_path, small(policy={"family": "tests.pipelines.test_export:wrapped"}))
    with pytest.raises(StoreError, match=r"built by 'tests\.pipelines\.test_export:wrapped', Python code .* add --trust-code"):
        export(experiment.store, experiment.document["base_policy_id"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_policy_goes_into_the_store(trained: Trained) -> None:
    store = trained("adapter").store
    with pytest.raises(StoreError, match=r"mine lies in the store .*: choose a place outside it$"):
        export(store, "last", Path(store.directory.root, "policies", "mine"))


def test_another_export_was_first(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"

    def card(*_: object) -> str:
        target.mkdir()
        (target / "theirs").touch()
        return ""

    monkeypatch.setattr("pipelines.export._card", card)
    with pytest.raises(ValueError, match=f"^{target} is there already: choose another folder$"):
        export(trained("adapter").store, "last", target)
    assert sorted(tmp_path.rglob("*")) == [target, target / "theirs"]


def test_the_command(trained: Trained, tmp_path: Path) -> None:
    experiment, folder = trained("adapter"), tmp_path / "out"
    store = experiment.store.directory.url
    told = opgrpo_json("export", "--policy", "last", "--store", store, "--to", folder)
    assert told == {"policy_id": experiment.learner(1).average_id, "kind": "lora", "folder": str(folder)}
    again = opgrpo("export", "--policy", "last", "--store", store, "--to", folder, check=False)
    assert (again.returncode, again.stderr) == (1, f"error: {folder} is there already: choose another folder\n")
    remote = opgrpo("export", "--policy", "last", "--store", store, "--to", "s3://bucket/out", check=False)
    assert remote.returncode == 2
    assert "a policy is written into a folder, got --to s3://bucket/out" in remote.stderr
