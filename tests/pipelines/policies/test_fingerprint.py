"""Fingerprints: of what the files say and how they are called, not of where they lie or when they were written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.policies import fingerprint as module
from pipelines.policies.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two parts, one of them in a subfolder of a subfolder."""
    model = tmp_path / "model"
    for name in ("transformer/config.json", "transformer/weights", "text/deep/vocab", "vae/weights"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    (model / "model_index.json").write_text("{}")
    return model


def test_it_is_of_content_and_names(folder: Path) -> None:
    parts = ["transformer", "text"]
    first = fingerprint(folder, parts)
    assert len(first) == 24
    found = {first}
    changes: dict[str, Callable[[Path], object]] = {
        "another byte": lambda model: (model / "transformer/weights").write_text("transformer/weighty"),
        "longer": lambda model: (model / "transformer/weights").write_text("transformer/weights "),
        "another name": lambda model: (model / "transformer/weights").rename(model / "transformer/weight"),
        "another folder": lambda model: (model / "text/deep").rename(model / "text/deeper"),
        "one more": lambda model: (model / "transformer/empty").touch(),
        "one less": lambda model: (model / "text/deep/vocab").unlink(),
        "the index": lambda model: (model / "model_index.json").write_text("[]"),
    }
    for number, (name, change) in enumerate(changes.items()):
        copy = folder.parent / f"copy {number}"
        shutil.copytree(folder, copy)
        assert fingerprint(copy, parts) == first
        change(copy)
        found.add(fingerprint(copy, parts))
        assert len(found) == number + 2, name


def test_it_is_not_of_place_time_order_or_other_parts(folder: Path, tmp_path: Path) -> None:
    first = fingerprint(folder, ["transformer", "text"])
    moved = folder.rename(tmp_path / "elsewhere")
    (moved / "transformer/weights").touch()
    (moved / "vae/weights").write_text("changed")
    (moved / "README.md").write_text("new")
    assert fingerprint(moved, ["text", "transformer", "text_encoder_that_is_not_there"]) == first


def test_single_files_may_join(folder: Path) -> None:
    text = fingerprint(folder, ["text"])
    joined = fingerprint(folder, ["text"], ["transformer/config.json"])
    assert joined != text
    (folder / "transformer/weights").write_text("changed")
    assert fingerprint(folder, ["text"], ["transformer/config.json"]) == joined
    (folder / "transformer/config.json").write_text("changed")
    assert fingerprint(folder, ["text"], ["transformer/config.json"]) != joined


def test_what_a_link_leads_to_counts(folder: Path, tmp_path: Path) -> None:
    """As in the cache of a hub, where names are links to blobs."""
    first = fingerprint(folder, ["transformer"])
    blob = (folder / "transformer/weights").rename(tmp_path / "blob")
    (folder / "transformer/weights").symlink_to(blob)
    assert fingerprint(folder, ["transformer"]) == first


def test_a_large_file_is_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size, head and blocks all over it: 16 blocks of 4 bytes, 64 apart, of 1024; the last block ends with 960 + 4."""
    for name, value in (("WHOLE_BYTES", 1023), ("SAMPLES", 16), ("SAMPLE_BYTES", 4)):
        monkeypatch.setattr(module, name, value)
    file = folder / "transformer/weights"
    data = bytes(range(256)) * 4
    file.write_bytes(data)
    first = fingerprint(folder, ["transformer"])
    seen = []
    for position in range(len(data)):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        if fingerprint(folder, ["transformer"]) != first:
            seen.append(position)
    assert seen == [position for position in range(1024) if position % 64 < 4]
    file.write_bytes(bytes(x ^ 1 for x in data))  # fine-tuned: everywhere another
    assert fingerprint(folder, ["transformer"]) != first
    file.write_bytes(data + b"x")
    assert fingerprint(folder, ["transformer"]) != first
    file.write_bytes(data[:1023])
    read_whole = fingerprint(folder, ["transformer"])
    file.write_bytes(data[:10] + b"x" + data[11:1023])
    assert fingerprint(folder, ["transformer"]) != read_whole
