"""Policies out of a store: by id, by its beginning, and the last one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opgrpo_data.errors import StoreError
from opgrpo_data.seal import read_json, sealed_json
from opgrpo_data.store import Store
from pipelines import sampler, weights
from pipelines.embedded import PIPELINE_DIR
from pipelines.experiment import Experiment
from pipelines.loop import STAGES
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.restore import Restored, restore
from pipelines.train import train
from tests.pipelines.helpers import created, flipped, forked, small

pytestmark = pytest.mark.usefixtures("on_cpu")

Trained = Callable[[str], Experiment]


def _velocity(policy: Any) -> Tensor:
    assert isinstance(policy, PipelinePolicy)
    latents = sampler.batch_noise(range(2), -1, policy.latent_shape, policy.device)
    with torch.no_grad():
        return policy.velocity(latents, torch.tensor([0.9, 0.3]).double(), policy.encode(["a red circle", "two blue squares"]))


def _id(restored: Restored) -> str:
    return weights.policy_id(weights.masters(restored.policy.trainable), restored.policy.identity)


def _ids(store: Store) -> dict[str, str]:
    """kind to policy_id."""
    return {document["kind"]: document["policy_id"] for document in store.documents("policies/*/policy.json")}


def test_last_is_how_far_the_newest_run_has_come(replayed: Path, tmp_path: Path) -> None:
    """Also when an earlier average of it is stored later, as after `opgrpo eval --iteration 1`."""
    experiment = forked(replayed, tmp_path)
    newest = experiment.keep_average(2)
    for stored in (newest, experiment.keep_average(1)):
        last = restore(experiment.store, "last", trust_code=True)
        assert (last.document["policy_id"], last.document["iteration"]) == (newest, 2)
        assert weights.policy_id(weights.trainable(last.policy.trainable)) == newest
        assert restore(experiment.store, stored[:6], trust_code=True).document["policy_id"] == stored


def test_there_may_be_no_last(replayed: Path, tmp_path: Path) -> None:
    """Base and trained policies are not what an evaluation would use."""
    experiment = forked(replayed, tmp_path)
    message = "the store has no averaged policy yet: finish a run, or name a policy of the view policies"
    with pytest.raises(StoreError, match=message):
        restore(experiment.store, "last", trust_code=True)


@pytest.mark.parametrize(
    ("ema", "kind"), [({"ema_decay": 0.0}, "trained"), ({"ema_every": 5}, "base")], ids=["no decay", "not yet moved"]
)
def test_last_may_be_no_policy_of_its_own(planned: Path, tmp_path: Path, ema: dict[str, float], kind: str) -> None:
    """The average is the trained policy to the last bit, or the base: it has one id, and was registered by that name."""
    experiment = forked(planned, tmp_path, train=ema)
    train(experiment, 0)
    policy_id = experiment.keep_average(1)
    last = restore(experiment.store, "last", trust_code=True)
    assert (last.document["policy_id"], last.document["kind"]) == (policy_id, kind)
    assert policy_id == (experiment.learner(1).policy_id if kind == "trained" else experiment.document["base_policy_id"])


@pytest.mark.parametrize("kind", ["adapter", "whole, bfloat16"])
def test_every_kind_of_policy_comes_back(trained: Trained, kind: str) -> None:
    experiment = trained(kind)
    ids, found = _ids(experiment.store), {}
    assert ids.keys() == {"base", "trained", "average"}
    for name, policy_id in ids.items():
        restored = restore(experiment.store, policy_id, trust_code=True)
        assert restored.document["policy_id"] == policy_id
        assert restored.run["base_policy_id"] == ids["base"]
        assert restored.config == experiment.config.policy
        assert weights.trainable(restored.policy.trainable).keys() == experiment.learner(1).model.keys()
        if "bfloat16" not in kind or name == "base":
            assert _id(restored) == policy_id
        found[name] = _velocity(restored.policy)
    learner = experiment.learner(1)
    golden = {"trained": _velocity(experiment.policy)}
    with learner.averaged():
        golden["average"] = _velocity(experiment.policy)
    golden["base"] = _velocity(experiment.learner(0).policy)
    assert all(torch.equal(found[name], golden[name]) for name in ids)
    assert len({float(velocity.sum()) for velocity in found.values()}) == 3


def test_an_id_is_known_by_its_beginning(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained("adapter").store.directory.url, tmp_path / "store")
    store = Store.open(str(tmp_path / "store"))
    policy_id = _ids(store)["average"]
    twin = f"{policy_id[:6]}{'0' if policy_id[6] != '0' else '1'}{policy_id[7:]}"
    shutil.copytree(tmp_path / f"store/policies/{policy_id}", tmp_path / f"store/policies/{twin}")
    file = tmp_path / f"store/policies/{twin}/policy.json"
    document = read_json(file.read_bytes())
    file.unlink()
    file.write_bytes(sealed_json({**document, "policy_id": twin}))
    assert restore(store, policy_id[:7], trust_code=True).document["policy_id"] == policy_id
    both = ", ".join(sorted((policy_id, twin)))
    with pytest.raises(StoreError, match=f"^several policies begin with {policy_id[:6]}: {both}: see the view policies"):
        restore(store, policy_id[:6], trust_code=True)


@pytest.mark.parametrize("policy_id", ["0123456789", "LAST", "latest"])
def test_an_unknown_id(trained: Trained, policy_id: str) -> None:
    with pytest.raises(StoreError, match=f"^the store has no policy {policy_id}: see the view policies of `opgrpo sql`$"):
        restore(trained("adapter").store, policy_id, trust_code=True)


@pytest.mark.parametrize("policy_id", ["../x", "/etc", "a/../..", "*", "?", "[a-f]", "", ".", "a b", "x" * 200])
def test_an_id_is_no_path_and_no_pattern(trained: Trained, policy_id: str) -> None:
    with pytest.raises(ValueError, match=f"^policy_id {re.escape(repr(policy_id))} cannot be part of a path: use letters"):
        restore(trained("adapter").store, policy_id, trust_code=True)


@pytest.fixture(scope="module")
def movable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and a store in which an adapter was trained on it. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("movable")
    model = folder / "model"
    shutil.copytree(PIPELINE_DIR, model)
    options = {"device": "cpu", "max_sequence_length": 0, "lora": {"rank": 2}}
    experiment = created(folder, small(policy={"family": "sd3", "model": str(model), "options": options}, train={"lr": 1e-2}))
    for stage in STAGES:
        stage(experiment, 0)
    experiment.keep_average(1)
    return folder


@pytest.mark.parametrize("change", ["a weight", "the autoencoder", "gone"])
def test_a_changed_base_model_is_refused(movable: Path, change: str) -> None:
    """Of an adapter: in its weights nothing shows what they are added to."""
    model, store = movable / "model", Store.open(str(movable / "store"))
    [run_id] = [run["run_id"] for run in store.documents("runs/*.json")]
    shutil.copytree(model, movable / "whole")
    try:
        if change == "gone":
            shutil.rmtree(model)
        else:
            part, name = ("transformer", "proj_out.bias") if change == "a weight" else ("vae", "decoder.conv_out.bias")
            file = model / part / "diffusion_pytorch_model.safetensors"
            state = load_file(file)
            state[name][0] += 1e-3
            save_file(state, file, metadata={"format": "pt"})
        for policy_id in _ids(store).values():
            told = {
                "a weight": f"the model '{model}' is not the one that policy {policy_id} was made of: with this one it is ",
                "the autoencoder": f"the files of '{model}' changed since run {run_id} began (",
                "gone": f"cannot load the StableDiffusion3Pipeline '{model}': ",
            }[change]
            with pytest.raises(ValueError, match=f"^{re.escape(told)}") as caught:
                restore(store, policy_id, trust_code=True)
            assert "\n" not in str(caught.value)
    finally:
        shutil.rmtree(model, ignore_errors=True)
        (movable / "whole").rename(model)
    assert restore(store, "last", trust_code=True).document["kind"] == "average"


def test_weights_that_are_gone_or_damaged(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained("adapter").store.directory.url, tmp_path / "store")
    store = Store.open(str(tmp_path / "store"))
    ids = _ids(store)
    kept = tmp_path / f"store/policies/{ids['average']}/weights.safetensors"
    flipped(kept, kept.stat().st_size - 5)
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged: .*Restore it from a copy$"):
        restore(store, ids["average"], trust_code=True)
    shutil.rmtree(tmp_path / "store/states")
    with pytest.raises(
        StoreError, match=rf"^the store does not keep the weights of policy {ids['trained']} \(iteration 1 of run"
    ):
        restore(store, ids["trained"], trust_code=True)
    assert restore(store, ids["base"], trust_code=True).document["kind"] == "base"
