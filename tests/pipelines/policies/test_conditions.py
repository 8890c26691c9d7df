"""Encoded prompts in the store: made once, read back bit for bit, damage found, and no text encoder needed again."""

from __future__ import annotations

import gc
import json
import math
import re
import tempfile
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opgrpo_data.errors import StoreError
from opgrpo_data.io import Directory
from pipelines.policies import pipeline_policy
from pipelines.policies.conditions import ConditionStore, batched, text_key
from pipelines.policies.family import Condition
from pipelines.policies.loading import Source
from pipelines.policies.pipeline_policy import PipelinePolicy
from tests.pipelines.helpers import flipped
from tests.pipelines.policies.families import TEXTS, Case


def test_text_encoders_go_and_are_not_needed_again(
    case: Case, folder: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = case.policy(folder, guidance_scale=3.0)
    encoder = weakref.ref(first.text_pipeline().text_encoder)
    golden = first.encode(TEXTS)
    first.prepare(directory, TEXTS)
    gc.collect()
    assert encoder() is None
    assert first.pipeline.text_encoder is None
    second = case.policy(folder, guidance_scale=3.0)

    def refuse(self: Source, dtype: torch.dtype, **components: Any) -> None:
        raise AssertionError("a text encoder was loaded again")

    monkeypatch.setattr(Source, "load", refuse)
    second.prepare(directory, TEXTS[::-1])
    found = second.encode(TEXTS)
    for name, tensor in golden.items():
        assert torch.equal(found[name], tensor)
    with pytest.raises(AssertionError, match="a text encoder was loaded again"):
        second.prepare(directory, ["one blurry diamond"])


def test_conditions_are_read_as_they_were_written(case: Case, folder: Path, directory: Directory) -> None:
    policy = case.policy(folder, dtype="bfloat16")
    policy.prepare(directory, TEXTS)
    fresh = case.policy(folder, dtype="bfloat16")
    (file,) = directory.list(f"conditions/encoder={policy.encoder_id}/*.safetensors")
    for text in (*TEXTS, policy.negative_prompt):
        read = ConditionStore(directory, policy.encoder_id).read(text)
        computed = fresh.architecture.encode(fresh.text_pipeline(), text, fresh.device)
        for name, tensor in computed.items():
            assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read[name].view(torch.uint8), tensor.view(torch.uint8))
    path = Path(directory.url) / file
    size = path.stat().st_size
    for offset in np.linspace(size // 2, size - 1, 7).astype(int):
        flipped(path, int(offset))
        with pytest.raises(StoreError, match="is damaged"):
            [ConditionStore(directory, policy.encoder_id).read(text) for text in (*TEXTS, policy.negative_prompt)]
        flipped(path, int(offset))


def test_what_changes_the_encoding_changes_its_place(case: Case, folder: Path) -> None:
    same, shorter, rounded = (case.policy(folder, **more) for more in ({}, {"max_sequence_length": 8}, {"dtype": "bfloat16"}))
    assert same.encoder_id == case.policy(folder, guidance_scale=2.0).encoder_id
    assert len({same.encoder_id, shorter.encoder_id, rounded.encoder_id}) == 3


def test_the_longest_condition_has_the_shapes_of_one(tiny_policy: PipelinePolicy) -> None:
    longest = tiny_policy.architecture.longest(tiny_policy.pipeline)
    condition = tiny_policy.encode([" ".join(["blue"] * 100)])
    assert condition.keys() == longest.keys()
    assert all(condition[name].shape[1:] == longest[name].shape for name in condition)
    assert all(condition[name].dtype == longest[name].dtype for name in condition)


# -- the files alone --------------------------------------------------------------------------------------------------


def _made(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embeds": torch.randn(seed, 3, generator=generator).to(torch.bfloat16),
        "pooled": torch.randn(5, generator=generator),
        "mask": torch.ones(seed, dtype=torch.int64),
    }


def _same(found: Condition, expected: Condition) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_conditions_of_several_files_are_one_store(directory: Directory) -> None:
    store = ConditionStore(directory, "one")
    assert store.missing(["b", "a", "b", ""]) == ["b", "a", ""]
    store.add({"a": _made(2), "": _made(3)})
    assert store.missing(["b", "a", "b", ""]) == ["b"]
    store.add({"b": _made(4)})
    for known in (store, ConditionStore(directory, "one")):
        assert known.missing(["b", "a", ""]) == []
        assert all(_same(known.read(text), _made(seed)) for text, seed in (("a", 2), ("", 3), ("b", 4)))
    assert ConditionStore(directory, "two").missing(["a"]) == ["a"]
    assert len(directory.list("conditions/encoder=one/*.safetensors")) == 2


def test_a_batch_is_padded_with_zeros() -> None:
    batch = batched([_made(2), _made(4)])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "embeds": (2, 4, 3),
        "pooled": (2, 5),
        "mask": (2, 4),
    }
    assert batch["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(batch["embeds"][0, :2], _made(2)["embeds"])
    assert not batch["embeds"][0, 2:].any()


@pytest.mark.parametrize(
    "damage", ["no header", "a header of 16 MiB and one", "half a header", "no checksums", "no safetensors"]
)
def test_a_damaged_header_is_found_when_the_store_is_opened(directory: Directory, damage: str) -> None:
    ConditionStore(directory, "one").add({"a": _made(2)})
    (file,) = directory.list("conditions/encoder=one/*.safetensors")
    path = Path(directory.url) / file
    whole = path.read_bytes()
    path.write_bytes(
        {
            "no header": b"",
            "a header of 16 MiB and one": (16 * 1024**2 + 1).to_bytes(8, "little") + whole[8:],
            "half a header": whole[:60],
            "no checksums": whole.replace(b"__metadata__", b"__nothing__!"),
            "no safetensors": b"\x02\0\0\0\0\0\0\0[]",
        }[damage]
    )
    with pytest.raises(StoreError, match=f"^{file} is damaged .*its prompts are encoded again$"):
        ConditionStore(directory, "one")


def test_a_missing_end_is_found_when_it_is_read(directory: Directory) -> None:
    store = ConditionStore(directory, "one")
    store.add({"a": _made(2)})
    (file,) = directory.list("conditions/encoder=one/*.safetensors")
    path = Path(directory.url) / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StoreError, match=f"^{file} is damaged .expected crc32 "):
        ConditionStore(directory, "one").read("a")


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.int64: torch.int64}


MADE = st.tuples(SHAPES, st.sampled_from(sorted(BITS, key=str)), st.integers(0))


@given(st.dictionaries(st.text(max_size=20), MADE, min_size=1, max_size=4), st.text(max_size=10))
@settings(deadline=None, max_examples=40)
def test_every_bit_comes_back(made: dict[str, tuple[tuple[int, ...], torch.dtype, int]], text: str) -> None:
    """Any bits, NaNs and infinities among them, under any names and any text."""
    condition = {}
    for name, (shape, dtype, seed) in made.items():
        kind = torch.iinfo(BITS[dtype])
        bits = np.random.default_rng(seed).integers(kind.min, kind.max, shape, dtype=f"int{kind.bits}", endpoint=True)
        condition[name] = torch.empty(shape, dtype=BITS[dtype]).copy_(torch.from_numpy(np.asarray(bits))).view(dtype)
    with tempfile.TemporaryDirectory() as folder:
        directory = Directory(folder)
        ConditionStore(directory, "one").add({text: condition, f"not {text}": {"": torch.zeros(1)}})
        found = ConditionStore(directory, "one").read(text)
    assert found.keys() == condition.keys()
    for name, tensor in condition.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.int32])
def test_a_dtype_that_could_not_be_read_again_is_not_written(directory: Directory, dtype: torch.dtype) -> None:
    store = ConditionStore(directory, "one")
    told = f"conditions of {dtype} cannot be stored: give one of ['BF16', 'F16', 'F32', 'I64']"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        store.add({"a": {"mask": torch.ones(2, dtype=dtype)}})
    assert directory.list("conditions/**") == []


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "ends before it begins": ({"data_offsets": [24, 0]}, "contradicts itself"),
    "before the file": ({"data_offsets": [-24, 0]}, "contradicts itself"),
    "more than its shape": ({"data_offsets": [0, 28]}, "contradicts itself"),
    "a negative shape": ({"shape": [-2, -3]}, "contradicts itself"),
    "a negative side": ({"shape": [-6]}, "contradicts itself"),
    "another dtype": ({"dtype": "I64"}, "contradicts itself"),
    "an unknown dtype": ({"dtype": "C64"}, "KeyError"),
    "a list for a dtype": ({"dtype": ["F32"]}, "TypeError"),
    "three offsets": ({"data_offsets": [0, 12, 24]}, "ValueError"),
    "no offsets": ({"data_offsets": None}, "TypeError"),
    "no shape": ({"shape": "six"}, "ValueError"),
    "infinite": ({"data_offsets": [0, math.inf]}, "OverflowError"),
    "behind the file": ({"data_offsets": [1000, 1024]}, "expected crc32"),
    "beyond all files": ({"data_offsets": [2**70, 2**70 + 24]}, "24 bytes at"),
    "longer than memory": ({"data_offsets": [0, 2**62], "shape": [2**60]}, "expected crc32"),
    "the header itself": ({"data_offsets": [4, 28]}, "expected crc32"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_refused(directory: Directory, kind: str) -> None:
    """Whatever a header tells of a tensor, nothing else is read or taken for it."""
    ConditionStore(directory, "one").add({"a": {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(2)}})
    changes, told = HEADERS[kind]
    (file,) = directory.list("conditions/encoder=one/*.safetensors")
    _rewritten(Path(directory.url) / file, f"{text_key('a')}/x", changes)
    with pytest.raises(StoreError, match=f"^{file} is damaged .*{told}.*: restore it from a copy, or remove it, and its"):
        ConditionStore(directory, "one").read("a")


def _rewritten(path: Path, name: str, changes: dict[str, Any]) -> None:
    """Change what a file's header tells of a tensor."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[name] |= changes
    told = json.dumps(header).encode()
    path.write_bytes(len(told).to_bytes(8, "little") + told + data[8 + size :])


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b"[]", b"{}", b'"x"', b"null", b'{"__metadata__": 3, "a/x": {}}', b"\xff\xfe"]
)
def test_headers_that_are_none(directory: Directory, header: bytes) -> None:
    file = "conditions/encoder=one/0.safetensors"
    assert directory.publish(file, len(header).to_bytes(8, "little") + header)
    with pytest.raises(StoreError, match=f"^{file} is damaged "):
        ConditionStore(directory, "one")


def test_names_in_a_header_are_no_paths(directory: Directory, tmp_path: Path) -> None:
    """A file that calls its tensors by the paths of others gives its own bytes, under keys that no text has."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    for name in ("../../secret/x", str(secret), f"{text_key('a')}/../../../secret"):
        tensors = {name: torch.zeros(2)}
        data = safetensors.torch.save(tensors, metadata={name: str(zlib.crc32(bytes(8)))})
        assert directory.publish(f"conditions/encoder=one/{zlib.crc32(name.encode())}.safetensors", data)
    store = ConditionStore(directory, "one")
    assert store.missing(["a", "b"]) == ["b"]
    assert [tensor.tolist() for tensor in store.read("a").values()] == [[0.0, 0.0]]


def test_overlapping_tensors_are_read_as_they_are_checked(directory: Directory) -> None:
    """Two names for the same bytes: harmless, if both checksums hold."""
    ConditionStore(directory, "one").add({"a": {"x": torch.arange(6.0), "y": torch.arange(6.0)}})
    (file,) = directory.list("conditions/encoder=one/*.safetensors")
    _rewritten(Path(directory.url) / file, f"{text_key('a')}/y", {"data_offsets": [0, 24]})
    assert _same(ConditionStore(directory, "one").read("a"), {"x": torch.arange(6.0), "y": torch.arange(6.0)})


# -- in memory --------------------------------------------------------------------------------------------------------


def test_forgotten_conditions_are_read_again(
    policy: PipelinePolicy, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a red circle", "two blue squares", "one green diamond", "a red circle"]
    golden = policy.encode(texts)
    each = sum(tensor.nbytes for tensor in policy._recent[texts[0]].values())
    policy.prepare(directory, texts)
    for limit, kept in ((0, 1), (2 * each, 2), (2 * each + 1, 2), (3 * each, 3)):
        monkeypatch.setattr(pipeline_policy, "REMEMBERED_BYTES", limit)
        policy._recent.clear()
        for _ in range(2):
            found = policy.encode(texts)
            assert _same(found, golden)
            assert len(policy._recent) == kept
    policy.encode(texts[:1])
    policy.encode(texts[1:2])
    monkeypatch.setattr(pipeline_policy, "REMEMBERED_BYTES", 2 * each)
    policy.encode(texts[:1])
    policy.encode(["a blue diamond"])
    assert list(policy._recent) == [texts[0], "a blue diamond"]  # the latest used
