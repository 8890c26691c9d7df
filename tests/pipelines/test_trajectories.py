"""Trajectories in tensors and in the store: continuations keep every byte, density and seed of what they continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from opgrpo_data.errors import CorruptionError
from opgrpo_data.io import Directory
from opgrpo_data.locations import LatentLocation
from opgrpo_data.plan import importance_weights
from opgrpo_data.reading import read_latents, read_media
from pipelines import media, sampler, weights
from pipelines.config import RunConfig
from pipelines.groups import Member
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.trajectories import Stored, draw_continuations, draw_fresh, evaluate, read_prefix, records, to_stored, to_tensor
from tests.pipelines.helpers import elements, flipped, grid_of, members_of, perturbed, small, stored

Rows = list[dict[str, Any]]


def _config(**rollout: Any) -> RunConfig:
    """Six steps, four groups of two: a fresh member and the one that continues a stored trajectory."""
    return small(rollout={"num_steps": 6, "prompts_per_iteration": 4, "group_size": 2, **rollout})


def _fresh(directory: Directory, policy: PipelinePolicy, config: RunConfig) -> Rows:
    members = members_of(config)[1::2]
    drawn = draw_fresh(policy, members, grid_of(policy, config), config.rollout.storage_dtype)
    return stored(directory, "00000", policy, members, drawn, config)


def _continued(
    directory: Directory, policy: PipelinePolicy, config: RunConfig, parents: Rows, kept: int, iteration: int
) -> tuple[list[Member], Rows]:
    last = {m.prompt.prompt_id: m for m in members_of(config, iteration, {row["prompt_id"]: [row] for row in parents})[1::2]}
    members = [last[row["prompt_id"]] for row in parents]
    prefix = Stored(
        texts=[member.prompt.text for member in members],
        states=torch.stack([read_prefix(directory, row, kept) for row in parents]),
        behaviour_logprob=[row["behaviour_logprob"] for row in parents],
        noise_seeds=[row["noise_seeds"] for row in parents],
    )
    grid = grid_of(policy, config)
    drawn = draw_continuations(policy, members, prefix, evaluate(policy, prefix, grid), grid, config.rollout.storage_dtype)
    return members, stored(directory, f"{iteration:05d}", policy, members, drawn, config)


def _latents(directory: Directory, row: dict[str, Any]) -> Tensor:
    return to_tensor(read_latents(directory, LatentLocation.of(row), 0, row["num_steps"]), row["latent_dtype"])


def _one_by_one(policy: PipelinePolicy, config: RunConfig, text: str, latents: Tensor) -> list[float]:
    """Log-density of every transition of one trajectory, evaluated in order, one at a time."""
    grid = grid_of(policy, config)
    found = []
    for k in range(grid.num_steps):
        steps = torch.tensor([k])
        x, following = latents[k : k + 1], latents[k + 1 : k + 2]
        with torch.no_grad():
            velocity = policy.velocity(x, torch.tensor(grid.sigmas)[steps], policy.encode([text]))
        found.append(float(sampler.log_density(grid, steps, x, following, velocity)))
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_latents_survive_storage_bit_by_bit(dtype: str) -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -3.25e-5, 6e-8, 1e-40, 65504.0, float("inf"), float("-inf"), 1 / 3])
    rounded = sampler.store_round(values, dtype)
    array = to_stored(rounded, dtype)
    assert array.dtype == {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]
    back = to_tensor(array, dtype)
    assert back.dtype == torch.float32
    assert torch.equal(back.view(torch.int32), rounded.view(torch.int32))
    assert np.array_equal(to_stored(back, dtype), array)


def test_bfloat16_bits_are_the_upper_half_of_float32() -> None:
    """Round to nearest even on the upper 16 bits, by integer arithmetic."""
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    golden = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(to_stored(torch.from_numpy(values), "bfloat16"), golden)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_fresh_trajectories(dtype: str, policy: PipelinePolicy, directory: Directory) -> None:
    config = _config(storage_dtype=dtype)
    members = members_of(config)
    drawn = draw_fresh(policy, members, grid_of(policy, config), dtype)
    assert drawn.latents.shape == (8, 7, *policy.latent_shape)
    for row, member, latents in zip(
        stored(directory, "00000", policy, members, drawn, config), members, drawn.latents, strict=True
    ):
        assert row["trajectory_id"] == member.trajectory_id
        assert row["prefix_steps"] == 0
        assert row["parent_id"] is None
        assert row["path_variance"] == []
        assert row["old_logprob"] == row["behaviour_logprob"]
        assert row["noise_seeds"] == [member.seed] * 6
        start = sampler.store_round(sampler.noise(member.initial_seed, -1, policy.latent_shape), dtype)
        assert torch.equal(_latents(directory, row)[0], start)
        picture = media.decode(read_media(directory, row))
        # Decoded in a batch of eight: a value on the edge between two integers may round the other way alone.
        assert np.abs(picture.astype(int) - policy.decode(latents[None, -1])[0].astype(int)).max() <= 1
        golden = _one_by_one(policy, config, member.prompt.text, _latents(directory, row))
        np.testing.assert_allclose(row["behaviour_logprob"], golden, atol=1e-6 * elements(policy) * 2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_continuation_keeps_the_prefix(dtype: str, policy: PipelinePolicy, directory: Directory) -> None:
    config = _config(storage_dtype=dtype)
    parents = _fresh(directory, policy, config)
    weights.copy_into(policy.trainable, perturbed(policy, 0.05, 1))
    members, rows = _continued(directory, policy, config, parents, 3, 1)
    for row, parent, member in zip(rows, parents, members, strict=True):
        assert row["parent_id"] == parent["trajectory_id"]
        assert row["prefix_steps"] == 3
        ours, theirs = (read_latents(directory, LatentLocation.of(r), 0, 6) for r in (row, parent))
        assert ours[:4].tobytes() == theirs[:4].tobytes()
        assert ours[4:].tobytes() != theirs[4:].tobytes()
        assert row["latents_crc32"][:4] == parent["latents_crc32"][:4]
        assert row["behaviour_logprob"][:3] == parent["behaviour_logprob"][:3]
        assert row["old_logprob"][:3] != parent["behaviour_logprob"][:3]
        assert row["old_logprob"][3:] == row["behaviour_logprob"][3:]
        assert row["noise_seeds"] == [parent["seed"]] * 3 + [member.seed] * 3
        golden = _one_by_one(policy, config, member.prompt.text, _latents(directory, row))
        np.testing.assert_allclose(row["old_logprob"], golden, atol=1e-6 * elements(policy) * 2)


def test_path_variance_of_a_prefix_is_the_distance_of_the_two_policies(policy: PipelinePolicy, directory: Directory) -> None:
    """lambda = |m_old - m_b|^2 / s^2, from the velocities of both policies in float64."""
    config = _config()
    grid = grid_of(policy, config)
    parents = _fresh(directory, policy, config)
    latents = torch.stack([_latents(directory, row) for row in parents])

    def velocities() -> Tensor:
        condition = policy.encode([member.prompt.text for member in members_of(config)[1::2]])
        with torch.no_grad():
            each = [policy.velocity(latents[:, k], torch.full((4,), grid.sigmas[k]).double(), condition) for k in range(3)]
        return torch.stack(each, 1).double()

    behaviour = velocities()
    weights.copy_into(policy.trainable, perturbed(policy, 0.05, 1))
    squares = (velocities() - behaviour).square().flatten(2).sum(2).numpy()
    golden = squares * (grid.velocity_coef[:3] / grid.std[:3]) ** 2
    _, rows = _continued(directory, policy, config, parents, 3, 1)
    np.testing.assert_allclose([row["path_variance"] for row in rows], golden, rtol=1e-3)
    assert golden.min() > 1e-4


@pytest.mark.parametrize(("dtype", "resolution"), [("float32", 2**-23), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_an_unchanged_policy_has_weight_1_and_no_path_variance(
    dtype: str, resolution: float, policy: PipelinePolicy, directory: Directory
) -> None:
    config = _config(storage_dtype=dtype)
    parents = _fresh(directory, policy, config)
    _, rows = _continued(directory, policy, config, parents, 4, 1)
    std = np.array(parents[0]["transition_std"][:4])
    for row in rows:
        largest = float(_latents(directory, row).abs().max())
        assert (np.array(row["path_variance"]) <= elements(policy) * (2 * resolution * largest / std) ** 2).all()
    continued = [row | {"role": "continuation"} for row in rows]
    for reduction, tolerance in (("sum", 1e-4), ("mean", 1e-6)):
        rule = small(replay={"weight_reduction": reduction}).plan_rule(0).weight
        np.testing.assert_allclose(importance_weights(continued, rule), 1, atol=tolerance)


@given(prefixes=st.lists(st.integers(1, 5), min_size=5, max_size=5), seed=st.integers(0, 1000))
@settings(
    deadline=None,
    max_examples=6,
    phases=[Phase.generate],  # to shrink a failure would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_chain_of_continuations_knows_who_drew_each_step(
    prefixes: list[int], seed: int, policy: PipelinePolicy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Five generations, each drawn by another policy with another prefix: step k is of the last one that redrew it."""
    directory = Directory(str(tmp_path_factory.mktemp("chain")))
    config = _config()
    shipped = {name: tensor.detach().clone() for name, tensor in weights.trainable(policy.trainable).items()}
    policies = [shipped, *(perturbed(policy, 0.03, seed + g) for g in range(1, 6))]
    drew, seeds = [0] * 6, []
    try:
        rows = _fresh(directory, policy, config)
        seeds.append([row["seed"] for row in rows])
        for generation, kept in enumerate(prefixes, 1):
            weights.copy_into(policy.trainable, policies[generation])
            _, rows = _continued(directory, policy, config, rows, kept, generation)
            seeds.append([row["seed"] for row in rows])
            drew[kept:] = [generation] * (6 - kept)
        for i, row in enumerate(rows):
            assert row["noise_seeds"] == [seeds[g][i] for g in drew]
        _check_drawn_by(policy, config, policies, drew, rows, directory)
    finally:
        weights.copy_into(policy.trainable, shipped)


def _check_drawn_by(
    policy: PipelinePolicy, config: RunConfig, policies: list[Any], drew: list[int], rows: Rows, directory: Directory
) -> None:
    """Behaviour densities are those of the policies named in `drew`, and its noise regenerates each transition."""
    grid = grid_of(policy, config)
    texts = {member.prompt.prompt_id: member.prompt.text for member in members_of(config)}
    for k, generation in enumerate(drew):
        weights.copy_into(policy.trainable, policies[generation])
        for row in rows:
            latents = _latents(directory, row)
            x, following, steps = latents[k : k + 1], latents[k + 1 : k + 2], torch.tensor([k])
            with torch.no_grad():
                sigmas = torch.tensor(grid.sigmas)[steps]
                velocity = policy.velocity(x, sigmas, policy.encode([texts[row["prompt_id"]]]))
            density = float(sampler.log_density(grid, steps, x, following, velocity))
            assert row["behaviour_logprob"][k] == pytest.approx(density, abs=2e-6 * elements(policy))
            mean = x + sampler.offset(grid, steps, x, velocity)
            again = mean + float(grid.std[k]) * sampler.noise(row["noise_seeds"][k], k, policy.latent_shape)
            assert float((again - following).abs().max()) <= 2e-5


def test_a_damaged_prefix_is_noticed(policy: PipelinePolicy, directory: Directory, tmp_path: Path) -> None:
    parent = _fresh(directory, policy, _config())[0]
    location = LatentLocation.of(parent)
    flipped(Path(directory.path(location.file)), location.offset + location.header + 3 * location.latent_bytes)
    assert read_prefix(directory, parent, 2).shape == (3, *policy.latent_shape)
    with pytest.raises(CorruptionError, match=r"latents\.npy latent 3: expected crc32"):
        read_prefix(directory, parent, 3)


def test_a_member_whose_parent_was_lost_has_no_parent(policy: PipelinePolicy) -> None:
    """It was drawn fresh in the parent's place: its row must not claim a prefix that it does not have."""
    config = _config()
    members = members_of(config, 1, {m.prompt.prompt_id: [{"trajectory_id": "lost"}] for m in members_of(config)})[1::2]
    assert all(member.parent for member in members)
    drawn = draw_fresh(policy, members, grid_of(policy, config), "float32")
    for record in records(policy, members, drawn, config.rollout, {}):
        assert record.row["parent_id"] is None
        assert record.row["prefix_steps"] == 0


def test_media_goes_with_its_prompt(policy: PipelinePolicy) -> None:
    config = _config(media_format="webp")
    members = members_of(config)[:2]
    drawn = draw_fresh(policy, members, grid_of(policy, config), "float32")
    for record, member in zip(records(policy, members, drawn, config.rollout, {"run_id": "r"}), members, strict=True):
        assert record.media_format == "webp"
        assert record.row["run_id"] == "r"
        assert dict(record.note) == {"prompt": member.prompt.text, "metadata": {}}
        assert media.decode(record.media).shape == (24, 24, 3)
