"""Folders of tiny models, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.rewards import tiny


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP. Do not change it: copy it."""
    return tiny.save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP. Do not change it: copy it."""
    return tiny.save_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture(scope="session")
def yolos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLOS. Do not change it: copy it."""
    return tiny.save_yolos(tmp_path_factory.mktemp("models") / "yolos")
