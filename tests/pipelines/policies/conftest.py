"""Tiny pipelines of every family, built once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from pipelines.policies.pipeline_policy import PipelinePolicy
from tests.pipelines.policies.families import CASES, Case


@pytest.fixture(params=[name for name in CASES if name != "sd3_without_t5"])
def case(request: pytest.FixtureRequest) -> Case:
    """Each family in turn."""
    return CASES[request.param]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The pipeline folder of a family. Shared: do not change it."""

    @cache
    def built(name: str) -> Path:
        return CASES[name].build(tmp_path_factory.mktemp("model") / name)

    return built


@pytest.fixture
def folder(case: Case, folder_of: Callable[[str], Path]) -> Path:
    """The pipeline folder of the case."""
    return folder_of(case.name)


@pytest.fixture(scope="session")
def loaded(folder_of: Callable[[str], Path]) -> Callable[[str, str, float], PipelinePolicy]:
    """The policy of a family, a dtype and a guidance scale, loaded once. Shared: do not change it."""
    return cache(lambda name, dtype, scale: CASES[name].policy(folder_of(name), dtype=dtype, guidance_scale=scale))


@pytest.fixture
def tiny_policy(case: Case, loaded: Callable[[str, str, float], PipelinePolicy]) -> PipelinePolicy:
    """The case's policy in float32, without guidance. Shared: do not change it."""
    return loaded(case.name, "float32", 1.0)
