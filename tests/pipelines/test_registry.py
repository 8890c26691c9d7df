"""Names to factories: ours by name, anyone's by import path, and clear words for everything else."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from pipelines.policies.base import POLICIES
from pipelines.registry import Registry
from pipelines.rewards.base import REWARDS

HERE = "tests.pipelines.bad_rewards"


def test_every_known_name_leads_to_a_factory() -> None:
    for path in (*REWARDS.known.values(), *POLICIES.known.values()):
        module, _, attribute = path.partition(":")
        assert callable(getattr(import_module(module), attribute))
    alone = {"colourfulness", "jpeg_compressibility", "ocr", "scene_soft", "scene_strict"}  # others want options or a download
    assert {REWARDS.build(name).name for name in alone} == alone
    assert POLICIES.build("sd3", model="embedded").latent_shape


def test_an_import_path_is_a_name() -> None:
    assert REWARDS.build(f"{HERE}:moody").name == "moody"
    assert REWARDS.build(f"{HERE}:picky", colour="red").name == "moody"


def test_known_modules_are_imported_only_when_asked_for() -> None:
    lazy: Registry[Any] = Registry("thing", {"broken": "no.such.module:thing", "good": f"{HERE}:moody"})
    assert lazy.build("good").name == "moody"
    with pytest.raises(
        ValueError, match=r"cannot import thing 'no\.such\.module:thing': ModuleNotFoundError: No module named 'no'"
    ):
        lazy.build("broken")


def test_an_unknown_name_lists_the_known_ones() -> None:
    known = ", ".join(sorted(REWARDS.known))
    with pytest.raises(ValueError, match=f"unknown reward 'beauty'; known: {known}; or give the import path"):
        REWARDS.build("beauty")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{HERE}:nothing", "cannot import reward .*nothing"),
        ("no_such_module_of_ours:x", "cannot import reward 'no_such_module_of_ours:x': ModuleNotFoundError: No module named"),
        (f"{HERE}:", "cannot import reward"),
        (f"{HERE}:not_callable", "cannot be built with options {}: TypeError: 'int' object is not callable"),
        (f"{HERE}:picky", r"cannot be built with options {}: .*missing 1 required keyword-only argument: 'colour'"),
    ],
)
def test_import_paths_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REWARDS.build(name)


@pytest.mark.parametrize("option", ["shade", "name"])
def test_options_that_the_factory_does_not_take(option: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be built with options {{'{option}': 1}}: .*unexpected keyword"):
        REWARDS.build("scene_soft", **{option: 1})
