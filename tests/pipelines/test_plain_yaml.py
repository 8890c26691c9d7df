"""Settings made to harm: refused in one line, in no time; and YAML as people write it is read as ever."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import ConfigError, load_config
from pipelines.plain_yaml import LONGEST, parse_yaml

LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))])
MERGES = "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 10))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['touch pwned']", "could not determine a constructor for the tag.*os.system"),
        ("!!python/name:os.system", "could not determine a constructor"),
        (LAUGHS, "it holds more than 10000 values"),
        (MERGES, "more than 10000 values are merged"),
        ("&a [*a]", "it holds more than 10000 values, or one that contains itself"),
        ("&a {b: *a}", "it holds more than 10000 values, or one that contains itself"),
        (f"a: &a 1\nb: [{'*a, ' * 101}]", "more than 100 aliases"),
        ("[" * 5000, "it is nested too deeply"),
        ("[" * 2000 + "]" * 2000, "it is nested too deeply"),
        ("{a: " * 2000 + "}" * 2000, "it is nested too deeply"),
        ("9" * 6000, "Exceeds the limit"),
        ("0x" + "f" * 100, "a number of 400 bits"),
        ("0b" + "1" * 90_000, "a number of 90000 bits"),
        (":".join(["59"] * 100), "a number of 591 bits"),
        ("2001-99-99", "month must be in 1..12"),
        ("!!int foo", "invalid literal for int"),
        ("!!bool maybe", "maybe"),
        ("!!timestamp never", "groupdict"),
        ("a: 1\nb: 2\na: 3", "the key 'a' stands there twice"),
        ("a: {b: 1, b: 1}", "the key 'b' stands there twice"),
        ("? [a]\n: 1", "unhashable"),
        ("a: *nowhere", "undefined alias"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("\0", "special characters are not allowed"),
        ("\x1b[31m", "special characters are not allowed"),
        ("x" * (LONGEST + 1), f"it has {LONGEST + 1} characters, {LONGEST} at most are read"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is not YAML: .*") as caught:
        load_config(path)
    assert len(str(caught.value)) < 1000
    path.write_text("name: x\niterations: 1\n")
    with pytest.raises(ConfigError, match=r"--set ['\"]reward=.* the value is not YAML: "):
        load_config(path, [f"reward={text}"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("value", ["x" * 50_000, "[" + "1, " * 5000 + "]", "7" * 70])
def test_a_long_wrong_value_is_shown_in_part(value: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"name: x\niterations: 1\nalgorithm: {value}\n")
    with pytest.raises(ConfigError, match="algorithm: Input should be") as caught:
        load_config(path)
    assert len(str(caught.value)) < 500


def test_what_people_write_is_read() -> None:
    text = "a: &a {x: 1, y: [1.5, yes, ~, 'no']}\nb: {<<: *a, x: 2}\nc: *a\nd: 2026-01-02\ne: 1_000\nf: 0x10"
    document = parse_yaml(text)
    assert document["b"] == {"x": 2, "y": [1.5, True, None, "no"]}
    assert document["c"] == document["a"]
    assert (document["d"], document["e"], document["f"]) == (date(2026, 1, 2), 1000, 16)
    assert parse_yaml("") is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(value=VALUES)
def test_what_yaml_writes_is_read_back(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value)) == value


@settings(deadline=None)
@given(text=st.text(alphabet="&*[]{}<:>!?-| \n\tab1'\"%@#,.", max_size=80))
def test_anything_is_a_document_or_refused(text: str) -> None:
    said = ""
    try:
        parse_yaml(text)
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
