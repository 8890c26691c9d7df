"""Where prompts come from: the embedded world, and files in which every bad line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipelines.embedded import scenes
from pipelines.prompts import Prompt, load_prompts, thinned

texts = st.text(min_size=1).filter(str.strip).filter(lambda text: text.isprintable() or "\u2028" in text)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts


def _file(tmp_path: Path, *lines: str | dict[str, Any]) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def test_embedded_prompts_are_the_worlds() -> None:
    loaded = load_prompts("embedded")
    assert set(loaded) == {"train", "held_out"}
    for split in ("train", "held_out"):
        world = scenes.prompts(split)
        assert [(p.text, p.metadata) for p in loaded[split]] == [(p.text, p.metadata) for p in world]
    everything = [p.prompt_id for prompts in loaded.values() for p in prompts]
    assert len(set(everything)) == len(everything)


def test_a_file(tmp_path: Path) -> None:
    source = _file(
        tmp_path,
        {"text": "a cat"},
        "",
        {"text": "a dog", "metadata": {"n": 1}, "split": "train"},
        {"text": "a dog", "metadata": {"n": 2}},
        {"text": "a cat", "metadata": {}},
        {"text": "a bird", "split": "held_out"},
    )
    assert load_prompts(source) == {
        "train": [Prompt("a cat", {}), Prompt("a dog", {"n": 1}), Prompt("a dog", {"n": 2})],
        "held_out": [Prompt("a bird", {})],
    }


@given(
    prompts=st.dictionaries(texts, st.dictionaries(texts, scalars, max_size=3), min_size=1, max_size=5),
    ascii_only=st.booleans(),
)
@example(prompts={"a\u2028cat\x85": {"note\u2029": "\x1c"}}, ascii_only=False)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_any_json_comes_back(prompts: dict[str, dict[str, Any]], ascii_only: bool, tmp_path: Path) -> None:
    """U+2028 and the like too: JSON allows them inside a line, though str.splitlines() would cut there."""
    lines = [json.dumps({"text": text, "metadata": metadata}, ensure_ascii=ascii_only) for text, metadata in prompts.items()]
    assert load_prompts(_file(tmp_path, *lines))["train"] == [Prompt(text, data) for text, data in prompts.items()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat", r"prompts\.jsonl:2 is not JSON"),
        ('{"text": "a cat"', r"prompts\.jsonl:2 is not JSON"),
        ("3", r'prompts\.jsonl:2: expected an object with a non-empty "text", got 3'),
        ('{"text": "  "}', r'prompts\.jsonl:2: expected an object with a non-empty "text"'),
        ('{"text": 3}', r'prompts\.jsonl:2: expected an object with a non-empty "text"'),
        ('{"text": "a", "split": "test"}', r"prompts\.jsonl:2: \"split\" is one of \('train', 'held_out'\)"),
        ('{"text": "a", "split": ["train"]}', r"prompts\.jsonl:2: \"split\" is one of"),
        ('{"text": "a", "metadata": [1]}', r"prompts\.jsonl:2: .*\"metadata\" an object"),
        ('{"text": "a", "meta": {}}', r"prompts\.jsonl:2: .*and nothing else"),
        ('{"text": "a", "metadata": {"n": NaN}}', r"prompts\.jsonl:2: .*not JSON compliant"),
        ('{"text": "a \\ud800"}', r"prompts\.jsonl:2: .*surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompts(_file(tmp_path, {"text": "fine"}, line))


def test_files_without_training_prompts_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    for lines in ([], [{"text": "a", "split": "held_out"}]):
        with pytest.raises(ValueError, match="holds no training prompt: give one JSON object a line"):
            load_prompts(_file(tmp_path, *lines))
    with pytest.raises(ValueError, match=r"cannot read the prompt file '.*none\.jsonl'"):
        load_prompts(str(tmp_path / "none.jsonl"))
    (tmp_path / "latin").write_bytes('{"text": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"cannot read the prompt file '.*latin'"):
        load_prompts(str(tmp_path / "latin"))


def test_prompt_id_covers_text_and_metadata_and_not_their_order() -> None:
    base = Prompt("a", {"x": 1, "y": 2}).prompt_id
    assert base == Prompt("a", {"y": 2, "x": 1}).prompt_id
    assert len({base, Prompt("b", {"x": 1, "y": 2}).prompt_id, Prompt("a", {"x": 1}).prompt_id}) == 3


@given(count=st.integers(1, 50), size=st.integers(1, 50))
def test_thinned_is_evenly_spaced(count: int, size: int) -> None:
    kept = thinned([Prompt(str(i), {}) for i in range(size)], count)
    places = [int(prompt.text) for prompt in kept]
    assert len(places) == min(count, size)
    assert places[0] == 0
    gaps = [after - before for before, after in zip(places, [*places[1:], size], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1
