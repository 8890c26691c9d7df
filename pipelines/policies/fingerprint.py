"""Which files a model consists of, as a short hash: quick for any size, and another for another model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

WHOLE_BYTES = 4 * 1024 * 1024
"""Files up to this size are read whole: configurations, tokenizers, small weights."""
SAMPLES = 4096
SAMPLE_BYTES = 4096
NOT_LOADED = (".md", ".bin", ".pt", ".pth", ".msgpack", ".h5")


def fingerprint(folder: Path, parts: Sequence[str], files: Sequence[str] = ()) -> str:
    """Hash of the files under the subfolders `parts` (those that are there), of model_index.json and of `files`.

    Large files count with their size, their first bytes (where safetensors lists all tensors) and 4,096 blocks spread over the
    rest: one in every megabyte of four gigabytes. What no pipeline of ours loads does not count: hidden files, notes, pickles,
    half-precision variants.
    """
    digest = hashlib.blake2b(digest_size=12)
    chosen = [folder / name for name in ("model_index.json", *files)]
    for part in sorted(parts):
        chosen += sorted(path for path in (folder / part).rglob("*") if path.is_file() and _is_loaded(path.name))
    for file in chosen:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}:{size};".encode())
        with file.open("rb") as opened:
            if size <= WHOLE_BYTES:
                digest.update(opened.read())
                continue
            for position in range(0, size, max(size // SAMPLES, 1)):
                opened.seek(position)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _is_loaded(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(NOT_LOADED) and ".fp16." not in name
