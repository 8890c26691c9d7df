"""Encoded prompts in the store: made once, read back bit for bit, damage found, and no text encoder needed again."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opgrpo_data.errors import StoreError
from opgrpo_data.io import Directory
from pipelines.policies.conditions import ConditionStore, batched
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
