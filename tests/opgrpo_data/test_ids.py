"""Ids and seeds: the same inputs give the same id everywhere, different inputs and different kinds never do."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opgrpo_data import ids
from opgrpo_data.io import NAME

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
COUNTS = st.integers(0, 2**40)


def blake(text: str, person: bytes, size: int = 12) -> str:
    """The recipe of all ids, written out: BLAKE2b of canonical JSON, personalised by the kind."""
    return hashlib.blake2b(text.encode(), digest_size=size, person=person).hexdigest()


def test_ids_are_hashes_of_canonical_json() -> None:
    assert ids.prompt_id("a red cube", {"b": 1, "a": [2]}) == blake('["a red cube",{"a":[2],"b":1}]', b"prompt")
    assert ids.run_id("tiny", {"seed": 3}) == "tiny-" + blake('["tiny",{"seed":3}]', b"run", 4)
    assert ids.group_id("tiny-1", 4, "p") == blake('["tiny-1",4,"p"]', b"group")
    assert ids.trajectory_id("g", 7) == blake('["g",7]', b"trajectory")
    assert ids.weights_id(b"abc") == hashlib.blake2b(b"abc", digest_size=12, person=b"policy").hexdigest()
    assert ids.derived_seed(1, "x") == int(blake('[1,"x"]', b"seed", 8), 16) // 2


def test_ids_never_change() -> None:
    """Stored data carries these: a change here orphans every store."""
    assert ids.prompt_id("ein roter Würfel", {"n": 1}) == "4e803f785066c22ff3779fd0"
    assert ids.group_id("tiny-1", 4, "p") == "93eef4ea44b70f43e8bc5ee3"
    assert ids.trajectory_id("g", 7) == "5c629ee1e416dda0f63de28b"
    assert ids.run_id("tiny", {"seed": 3}) == "tiny-54b0a92a"
    assert ids.weights_id(b"abc") == "a644b0b82a006b564167542a"
    assert ids.derived_seed(1, "x") == 8451768608175754906


def test_ids_do_not_depend_on_the_process() -> None:
    script = "from opgrpo_data import ids; print(ids.group_id('r', 1, 'p'), ids.derived_seed('s', 2))"
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONHASHSEED": seed})
        assert done.stdout.split() == [ids.group_id("r", 1, "p"), str(ids.derived_seed("s", 2))]


@given(first=st.tuples(WORDS, COUNTS, WORDS), second=st.tuples(WORDS, COUNTS, WORDS))
def test_ids_are_equal_exactly_when_their_parts_are(first: tuple[str, int, str], second: tuple[str, int, str]) -> None:
    assert (ids.group_id(*first) == ids.group_id(*second)) == (first == second)
    assert (ids.derived_seed(*first) == ids.derived_seed(*second)) == (first == second)
    assert (ids.trajectory_id(*first[:2]) == ids.trajectory_id(*second[:2])) == (first[:2] == second[:2])


@given(text=WORDS, metadata=st.dictionaries(WORDS, COUNTS, max_size=3))
def test_order_of_metadata_does_not_matter(text: str, metadata: dict[str, int]) -> None:
    backwards = dict(reversed(metadata.items()))
    assert ids.prompt_id(text, metadata) == ids.prompt_id(text, backwards)
    assert ids.prompt_id(text, metadata) != ids.prompt_id(text, metadata | {"new key": 1})


@given(word=WORDS, count=COUNTS)
def test_kinds_are_disjoint_even_for_equal_parts(word: str, count: int) -> None:
    kinds = [
        ids.trajectory_id(word, count),
        ids.prompt_id(word, {}),
        ids.group_id(word, count, word),
        ids.weights_id(word.encode()),
        blake(ids.canonical_json((word, count)), b""),
    ]
    assert len(set(kinds)) == len(kinds)


def test_kind_is_all_that_parts_a_seed_from_an_id() -> None:
    assert blake('["g",7]', b"trajectory", 8) != blake('["g",7]', b"seed", 8)
    assert ids.derived_seed("g", 7) != int(ids.trajectory_id("g", 7)[:16], 16) // 2


@given(parts=st.lists(COUNTS | WORDS, max_size=4))
def test_seeds_fit_an_int64_and_a_torch_generator(parts: list[int | str]) -> None:
    assert 0 <= ids.derived_seed(*parts) < 2**63


def test_seeds_use_their_whole_range() -> None:
    seeds = [ids.derived_seed(n) for n in range(2000)]
    assert len(set(seeds)) == 2000
    assert max(seeds) > 0.99 * 2**63
    assert min(seeds) < 0.01 * 2**63
    assert sum(seeds) / 2000 == pytest.approx(2**62, rel=0.05)  # 3.9 standard errors of a uniform mean


def test_a_part_is_not_the_text_that_looks_like_it() -> None:
    assert ids.derived_seed(1) != ids.derived_seed("1")
    assert ids.derived_seed("a", "b") != ids.derived_seed("ab")
    assert ids.derived_seed("a,b") != ids.derived_seed("a", "b")


@given(word=WORDS, count=COUNTS)
def test_ids_are_safe_in_paths(word: str, count: int) -> None:
    for made in (ids.prompt_id(word, {}), ids.group_id(word, count, word), ids.trajectory_id(word, count)):
        assert NAME.fullmatch(made)
        assert "." not in made  # WebDataset ends a key at its first dot


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        ids.canonical_json({"lr": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        ids.prompt_id("a", {"weight": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        ids.run_id("a", {"lr": [value]})


def test_canonical_json_is_compact_sorted_and_unescaped() -> None:
    assert ids.canonical_json({"ü": 1.5, "a": [True, None, "x"]}) == '{"a":[true,null,"x"],"ü":1.5}'
