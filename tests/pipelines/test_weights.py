"""Weights as bytes: ids that change when, and only when, a weight does."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pipelines import weights


def _weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn((4, 3), generator=generator),
        "a.bias": torch.randn(3, generator=generator).to(torch.bfloat16),
        "scale": torch.tensor(0.5),
    }


def test_policy_id_is_of_names_dtypes_shapes_and_bytes() -> None:
    base = _weights()
    one = base["b.weight"].clone()
    one[0, 0] = torch.nextafter(one[0, 0], torch.tensor(9.0))
    variants: list[dict[str, Tensor]] = [
        base,
        {**base, "b.weight": one},
        {**base, "b.weight": base["b.weight"].reshape(3, 4)},
        {**base, "b.weight": base["b.weight"].view(torch.int32)},
        {**base, "scale": torch.tensor(0.5, dtype=torch.float64)},
        {**base, "scale": torch.tensor([0.5])},
        {("c" if name == "scale" else name): tensor for name, tensor in base.items()},
        {name: tensor for name, tensor in base.items() if name != "scale"},
        {**base, "extra": torch.zeros(0)},
    ]
    assert len({weights.policy_id(variant) for variant in variants}) == len(variants)
    zeros = ({"x": torch.tensor([0.0])}, {"x": torch.tensor([-0.0])})
    assert weights.policy_id(zeros[0]) != weights.policy_id(zeros[1])


def test_policy_id_is_not_of_order_layout_or_gradients() -> None:
    base = _weights()
    expected = weights.policy_id(base)
    assert weights.policy_id(dict(reversed(base.items()))) == expected
    assert weights.policy_id({**base, "b.weight": base["b.weight"].t().contiguous().t()}) == expected
    assert weights.policy_id({name: nn.Parameter(tensor) for name, tensor in base.items()}) == expected


def test_round_trip() -> None:
    base = _weights()
    back = weights.from_bytes(weights.to_bytes(base, "here"), "here")
    assert weights.policy_id(back) == weights.policy_id(base)
    strided = {"x": torch.arange(12.0).reshape(3, 4).t()}
    assert torch.equal(weights.from_bytes(weights.to_bytes(strided, "here"), "here")["x"], strided["x"])


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_damaged_bytes_are_named(keep: int) -> None:
    with pytest.raises(ValueError, match="the file is damaged: "):
        weights.from_bytes(weights.to_bytes(_weights(), "the file")[:keep], "the file")


def test_the_bytes_of_another_file_are_refused() -> None:
    data = weights.to_bytes(_weights(), "states/a")
    with pytest.raises(ValueError, match=r"^states/b is another file, that of states/a\. Restore it from a copy$"):
        weights.from_bytes(data, "states/b")


def test_older_bytes_do_not_say_whose_they_are() -> None:
    base = _weights()
    digest = weights.to_bytes(base, "")
    plain = safetensors.torch.save(base, metadata={"digest": _metadata(digest)["digest"].strip()})
    assert weights.policy_id(weights.from_bytes(plain, "anywhere")) == weights.policy_id(base)


def _metadata(data: bytes) -> dict[str, str]:
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header["__metadata__"]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)


def test_trainable_leaves_the_frozen_out() -> None:
    assert set(weights.trainable(_Model())) == {"inner.weight", "inner.bias"}


def test_copy_into() -> None:
    model = _Model()
    frozen = model.frozen.weight.clone()
    new = {"inner.weight": torch.full((2, 3), 7.0), "inner.bias": torch.full((2,), 8.0)}
    weights.copy_into(model, new)
    assert torch.equal(model.inner.weight, new["inner.weight"])
    assert torch.equal(model.inner.bias, new["inner.bias"])
    assert torch.equal(model.frozen.weight, frozen)
    assert model.inner.weight.requires_grad
    assert model.inner.weight.grad is None


def test_weights_of_another_model_are_refused() -> None:
    model = _Model()
    good = {"inner.weight": torch.zeros(2, 3), "inner.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"of another model: 1 parameter names differ, for example 'inner\.bias'"):
        weights.copy_into(model, {"inner.weight": good["inner.weight"]})
    with pytest.raises(ValueError, match="of another model: 1 parameter names differ, for example 'outer'"):
        weights.copy_into(model, {**good, "outer": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"of another model: inner.weight is \(3, 2\) there and \(2, 3\) here"):
        weights.copy_into(model, {**good, "inner.weight": torch.zeros(3, 2)})
