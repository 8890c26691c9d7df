"""The configuration: what it refuses, in which words, and what makes two runs the same run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.config import ConfigError, RunConfig, build_config, load_config
from tests.pipelines.helpers import small

ROOT = Path(__file__).parents[2]
MINIMAL = "name: a\niterations: 2\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the least that a configuration needs."""
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    return file


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: str(file.name))
def test_every_example_loads(file: Path) -> None:
    assert isinstance(load_config(file), RunConfig)


def test_there_are_examples() -> None:
    assert list((ROOT / "examples").glob("*.yaml"))


def test_minimal_file_takes_the_defaults(path: Path) -> None:
    config = load_config(path)
    assert (config.name, config.iterations, config.algorithm) == ("a", 2, "op_grpo")
    assert config.policy.model == "embedded"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.lr=1e-4", "train", "lr", 1e-4),  # a string in YAML 1.1
        ("train.lr=1.0e-4", "train", "lr", 1e-4),
        ("train.window=null", "train", "window", None),
        ("train.betas=[0.8, 0.95]", "train", "betas", (0.8, 0.95)),
        ("policy.options={dtype: bfloat16}", "policy", "options", {"dtype": "bfloat16"}),
        ("policy.options.guidance_scale=4.5", "policy", "options", {"guidance_scale": 4.5}),
        ("prompts.source=a=b.jsonl", "prompts", "source", "a=b.jsonl"),
        ("rollout.shared_initial_noise=false", "rollout", "shared_initial_noise", False),
    ],
)
def test_overrides(path: Path, override: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(load_config(path, [override]), section), key) == value


def test_overrides_of_the_top_level_and_of_nested_sections(path: Path) -> None:
    config = load_config(path, ["name=b", "seed=3", "eval.reward.name=scene_soft", "iterations=3", "iterations=4"])
    assert (config.name, config.seed, config.eval_reward.name, config.iterations) == ("b", 3, "scene_soft", 4)
    assert config.reward.name != "scene_soft"
    assert load_config(path, ["reward.name=scene_soft"]).eval_reward.name == "scene_soft"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL + "train: {lrr: 1}", (), "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        (MINIMAL + "trian: {lr: 1}", (), "unknown key 'trian'; did you mean 'train'?"),
        (MINIMAL + "lr: 1", (), "unknown key 'lr'; did you mean 'train.lr'?"),
        (MINIMAL + "zzzz: 1", (), "unknown key 'zzzz'$"),
        (MINIMAL, ("eval.reward.nam=x",), "unknown key 'eval.reward.nam'; did you mean 'eval.reward.name'?"),
        (MINIMAL + "1: 2", (), "1: Keys should be strings"),
        ("iterations: 2", (), "name: Field required"),
        (MINIMAL, ("iterations=1.5",), "iterations: Input should be a valid integer.*got 1.5"),
        (MINIMAL, ("train.lr=fast",), "train.lr: Input should be a valid number.*got 'fast'"),
        (MINIMAL, ("train.lr=.nan",), "train.lr: Input should be a finite number, got nan"),
        (MINIMAL, ("train.lr=0",), "train.lr: Input should be greater than 0, got 0"),
        (MINIMAL, ("train.betas=[0.9, 1.5]",), "train.betas.1: Input should be less than 1, got 1.5"),
        (MINIMAL, ("train.betas=[0.9]",), "train.betas.1: Field required"),
        (
            MINIMAL,
            ("rollout.sampler=ddpm",),
            "rollout.sampler: Input should be 'flow_sde', 'flow_cps', 'dance_sde' or 'wan_sde', got 'ddpm'",
        ),
        (MINIMAL, ("rollout.sampler=ode",), "rollout.sampler: ode has no noise, hence no density and no ratio to train with"),
        (MINIMAL, ("name=a/b",), "name: String should match pattern .*got 'a/b'"),
        (MINIMAL, ("name=..",), "name: String should match pattern"),
        (MINIMAL, ("train=3",), "train: Input should be a valid dictionary.*got 3"),
        (MINIMAL, ("train.lr=1", "train.lr.x=1"), "'lr' is a value, not a section"),
        (MINIMAL, ("name.x=1",), "'name' is a value, not a section"),
        (MINIMAL, ("train.lr",), "expected key=value, for example train.lr=1e-4"),
        (MINIMAL, ("train.lr=[",), "--set 'train.lr=\\[': the value is not YAML: "),
        (MINIMAL, ("=3",), "unknown key ''"),
        ("[1, 2]", (), "must hold a mapping of settings, not list"),
        ("", (), "must hold a mapping of settings, not NoneType"),
        ("a: [", (), "is not YAML: "),
        # Settings that contradict each other.
        (MINIMAL, ("replay.prefix_steps=10",), "replay.prefix_steps 10 must be smaller than rollout.num_steps 10"),
        (MINIMAL, ("replay.weight_min=3",), "replay.weight_min 3.0 is above replay.weight_max 2.0"),
        (MINIMAL, ("replay.decay=1.5",), r"replay.decay 1.5 must lie in \(0, 1\] when decay_form is multiplicative"),
        (MINIMAL, ("replay.decay=0",), r"replay.decay 0.0 must lie in \(0, 1\]"),
        (
            MINIMAL,
            ("rollout.sampler=flow_cps", "rollout.noise_level=1"),
            "rollout.noise_level 1.0 must be below 1 for flow_cps",
        ),
        (MINIMAL, ("train.optimizer_steps=65",), "train.optimizer_steps 65 exceeds the 64 trajectories there are"),
    ],
)
def test_refusals_say_what_where_and_what_to_do(path: Path, text: str, overrides: tuple[str, ...], message: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("?", "\\?") if message.endswith("?") else message) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    if not str(caught.value).startswith("--set"):
        assert str(path) in str(caught.value)


def test_all_problems_are_told_at_once(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.group_size: .*greater than or equal to 2, got 1; .*'train.lrr'"):
        load_config(path, ["rollout.group_size=1", "train.lrr=1"])


def test_a_missing_and_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"no config file {tmp_path / 'none.yaml'}")):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.yaml is not YAML"):
        load_config(tmp_path / "binary.yaml")


def test_what_is_allowed_next_to_what_is_refused() -> None:
    assert small(replay={"decay_form": "linear", "decay": 2.0}).buffer_rule.decay == 2.0
    assert small(rollout={"sampler": "flow_cps", "noise_level": 0.99}).rollout.noise_level == 0.99
    assert small(replay={"prefix_steps": 4}).replay.prefix_steps == 4


def test_a_configuration_cannot_be_changed() -> None:
    config = small()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0  # type: ignore[misc]


def test_run_id_is_of_what_changes_what_is_trained() -> None:
    base = small()
    for same in ({"iterations": 100}, {"eval": {"seed": 1}}, {"train": {"keep_states": 5}}):
        assert small(**same).run_id == base.run_id
    on_policy = small(algorithm="flow_grpo")
    assert small(algorithm="flow_grpo", replay={"decay": 0.9}).run_id == on_policy.run_id
    assert base.run_id.startswith("small-")
    changes: list[dict[str, Any]] = [
        {"name": "other"},
        {"seed": 1},
        {"algorithm": "flow_grpo"},
        {"policy": {"options": {"dtype": "bfloat16"}}},
        {"prompts": {"limit": 3}},
        {"rollout": {"noise_level": 0.6}},
        {"replay": {"decay": 0.9}},
        {"reward": {"batch_size": 3}},
        {"train": {"lr": 1e-3}},
    ]
    ids = {base.run_id, *(small(**change).run_id for change in changes)}
    assert len(ids) == len(changes) + 1


def test_a_setting_at_its_default_is_the_same_run() -> None:
    assert small(train={"weight_decay": 0.0}).run_id == small().run_id
    assert build_config(small().model_dump(mode="json"), "again").run_id == small().run_id


def test_plan_rule_has_the_settings_and_a_seed_of_its_own_per_iteration() -> None:
    config = small(train={"window": None, "advantage_std": "global"}, replay={"weight_max": 3.0})
    rules = [config.plan_rule(i) for i in range(3)]
    assert len({rule.seed for rule in rules}) == 3
    assert rules[0] == config.plan_rule(0)
    assert (rules[0].window, rules[0].advantage_std, rules[0].weight.highest) == (None, "global", 3.0)
    assert small(seed=1).plan_rule(0).seed != rules[0].seed


def test_a_setting_at_its_default_is_no_part_of_the_identity() -> None:
    """So a setting that a later version adds leaves the ids of older runs as they are."""
    base = {"name": "a", "iterations": 3}
    plain = build_config(base, "test")
    defaults = {"train": {"lr": plain.train.lr, "keep_states": 5}, "seed": 0, "eval": {"samples": 7}}
    spelled_out = build_config(base | defaults, "test")
    assert plain.identity == spelled_out.identity == {}
    assert plain.run_id == spelled_out.run_id
    assert build_config(base | {"train": {"lr": 0.5}}, "test").identity == {"train": {"lr": 0.5}}
