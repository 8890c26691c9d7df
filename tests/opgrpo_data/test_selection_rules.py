"""What the replay buffer keeps: best, worst, a uniform draw, or what the user's own SQL says."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from opgrpo_data.buffer import SELECTIONS, BufferRule, candidates, select
from opgrpo_data.errors import StoreError
from opgrpo_data.schema import BUFFERS
from tests.opgrpo_data.factories import RUN, buffer_rule, located_row, no_buffer, reward_row, rewards, trajectories

Scores = Mapping[str, float | None]
"""trajectory_id `<prompt>-<whatever>` to its reward."""


def found(scores: Scores, iteration: int = 0, continuations: Iterable[str] = ()) -> pa.Table:
    """Candidates of one iteration; the prompt is what stands before the first dash."""
    kept = dict.fromkeys(continuations, 2)
    rows = [
        located_row(name, prompt_id=name.split("-")[0], iteration=iteration, prefix_steps=kept.get(name, 0)) for name in scores
    ]
    return candidates(trajectories(rows), rewards(dict(scores)))


def snapshot(
    history: Sequence[Scores], rule: BufferRule, excluded: Iterable[str] = (), continuations: Iterable[str] = ()
) -> pa.Table:
    """The buffer after the last of these iterations, each made from the one before."""
    kept, continued = no_buffer(), set(continuations)
    for iteration, scores in enumerate(history):
        new = found(scores, iteration, continued & set(scores))
        kept = select(kept, new, set(excluded), run_id=RUN, iteration=iteration, rule=rule)
    return kept


def ids(table: pa.Table) -> list[str]:
    """In the order of the buffer."""
    return [str(name) for name in table["trajectory_id"].to_pylist()]


def by_prompt(table: pa.Table) -> dict[str, list[str]]:
    """prompt_id to its entries, in the order of the buffer."""
    kept: dict[str, list[str]] = {}
    for row in table.to_pylist():
        kept.setdefault(row["prompt_id"], []).append(row["trajectory_id"])
    return kept


# -- best, worst and random ----------------------------------------------------------------------------------------------


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, float]]:
    """1..4 iterations of up to five trajectories on two prompts. Eighths decayed by halves: exact in float64."""
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    names = iter(draw(st.permutations(range(sum(sizes)))))
    prompts, eighths = st.sampled_from(["p", "q"]), st.integers(-8, 8).map(lambda n: n / 8)
    return [{f"{draw(prompts)}-{next(names):02d}": draw(eighths) for _ in range(size)} for size in sizes]


def ranked(history: Sequence[Mapping[str, float]], selection: str) -> dict[str, list[str]]:
    """By prompt: all of history in the order of the rule, with exact numbers. Of equals the newer comes first."""
    last = len(history) - 1
    keys: dict[str, tuple[Any, ...]] = {}
    for born, scores in enumerate(history):
        for name, reward in scores.items():
            factor = Fraction(1, 2) ** (last - born)
            decayed = Fraction(reward) * factor if reward >= 0 else Fraction(reward) / factor
            keys[name] = (-decayed if selection == "best" else Fraction(reward), -born, name)
    ordered: dict[str, list[str]] = {}
    for name in sorted(keys, key=lambda name: keys[name]):
        ordered.setdefault(name.split("-")[0], []).append(name)
    return ordered


@pytest.mark.parametrize("selection", ["best", "worst"])
@pytest.mark.parametrize("members", [1, 2, 3])
@given(history=histories())
@settings(deadline=None, max_examples=4)
def test_so_many_of_all_history_stay(selection: str, members: int, history: list[dict[str, float]]) -> None:
    """Made one iteration at a time from the buffer before, it is what ranking everything ever drawn gives."""
    kept = by_prompt(snapshot(history, buffer_rule(0.5, selection=selection, members=members)))
    assert kept == {prompt: names[:members] for prompt, names in sorted(ranked(history, selection).items())}


@pytest.mark.parametrize("members", [1, 2, 3])
def test_each_rule_keeps_its_number_of_entries_per_prompt(members: int) -> None:
    scores = {f"{prompt}-{i}": i / 8 for prompt in ("p", "q") for i in range(4)} | {"r-0": 0.5}
    for selection in SELECTIONS:
        kept = by_prompt(snapshot([scores], buffer_rule(selection=selection, members=members)))
        assert {prompt: len(names) for prompt, names in kept.items()} == {"p": members, "q": members, "r": 1}
    best = by_prompt(snapshot([scores], buffer_rule(selection="best", members=members)))
    worst = by_prompt(snapshot([scores], buffer_rule(selection="worst", members=members)))
    assert best["p"] == [f"p-{3 - i}" for i in range(members)]
    assert worst["p"] == [f"p-{i}" for i in range(members)]


def test_worst_does_not_know_age() -> None:
    """With decay an old success would look worse than a new failure."""
    assert ids(snapshot([{"p-old": 1.0}, {}, {}, {}, {"p-new": 0.5}], buffer_rule(0.25, selection="worst"))) == ["p-new"]
    assert ids(snapshot([{"p-old": 0.5}, {}, {"p-new": 1.0}], buffer_rule(0.25, selection="worst"))) == ["p-old"]
    assert ids(snapshot([{"p-old": 0.5}, {"p-new": 0.5}], buffer_rule(selection="worst"))) == ["p-new"]


def many_prompts(order: int | None = None) -> list[dict[str, float]]:
    """Four iterations, each with one trajectory of each of 300 prompts; `order` shuffles each iteration's rows."""
    history = []
    for born in range(4):
        names = [f"p{prompt:03d}-{born}" for prompt in range(300)]
        random.Random(order).shuffle(names) if order is not None else None
        history.append({name: float(born) for name in names})
    return history


@pytest.mark.parametrize("seed", [0, 1])
def test_random_is_a_uniform_draw_from_all_history(seed: int) -> None:
    """Which iteration the entry of each of 300 prompts comes from: chi-square against a quarter each."""
    kept = snapshot(many_prompts(), buffer_rule(selection="random", seed=seed))
    counts = Counter(name.split("-")[1] for name in ids(kept))
    assert sorted(counts) == ["0", "1", "2", "3"]
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


def test_random_pairs_are_uniform_too() -> None:
    """Each of the 12 ordered pairs of four trajectories is as likely, and none is drawn twice."""
    kept = by_prompt(snapshot(many_prompts(), buffer_rule(selection="random", members=2, seed=5)))
    pairs = Counter(tuple(name.split("-")[1] for name in names) for names in kept.values())
    assert len(pairs) == 12
    assert all(one != other for one, other in pairs)
    assert stats.chisquare(list(pairs.values())).pvalue > 0.01


def test_random_draws_follow_the_seed_only() -> None:
    rule = buffer_rule(selection="random", members=2, seed=3)
    kept = ids(snapshot(many_prompts(), rule))
    assert ids(snapshot(many_prompts(order=1), rule)) == kept  # not the order of rows
    alike = [dict.fromkeys(scores, 1.0) for scores in many_prompts(order=2)]
    assert ids(snapshot(alike, rule)) == kept  # nor their rewards
    other = ids(snapshot(many_prompts(), buffer_rule(selection="random", members=2, seed=4)))
    same = len(set(kept) & set(other)) / len(kept)
    assert same == pytest.approx(0.5, abs=0.05)  # independent pairs of four share half their members


@given(
    rewards_by_turn=st.lists(st.sampled_from([1.0, 0.5, math.nan, None]), min_size=1, max_size=6),
    selection=st.sampled_from(SELECTIONS),
)
@settings(deadline=None, max_examples=5)
def test_no_rule_keeps_what_cannot_be_judged_or_read(rewards_by_turn: list[float | None], selection: str) -> None:
    history = [{f"p-{i}": value} for i, value in enumerate(rewards_by_turn)]
    kept = ids(snapshot(history, buffer_rule(selection=selection, members=9), excluded={"p-0"}))
    usable = [f"p-{i}" for i, value in enumerate(rewards_by_turn) if i and value is not None and math.isfinite(value)]
    assert sorted(kept) == usable


# -- the user's own SQL --------------------------------------------------------------------------------------------------

FOUR = {"p-0": 0.0, "p-1": 0.25, "q-0": 0.5, "q-1": 1.0}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT trajectory_id FROM entries WHERE reward >= 0.25 ORDER BY reward DESC", ["q-1", "q-0", "p-1"]),
        ("select * from entries order by reward limit 2", ["p-0", "p-1"]),
        ("WITH good AS (FROM entries WHERE reward > 0.9) SELECT trajectory_id FROM good", ["q-1"]),
        ("SELECT trajectory_id FROM entries ORDER BY trajectory_id LIMIT getvariable('members')", ["p-0", "p-1", "q-0"]),
        ("SELECT unnest(['q-0', 'p-0', 'q-0', 'p-0']) AS trajectory_id", ["q-0", "p-0"]),
        ("SELECT trajectory_id FROM entries WHERE false", []),
        ("SELECT trajectory_id FROM entries WHERE getvariable('iteration') = 0 AND reward = getvariable('seed') / 2", ["q-1"]),
    ],
)
def test_own_sql_decides_what_stays_and_in_which_order(query: str, expected: list[str]) -> None:
    assert ids(snapshot([FOUR], buffer_rule(selection=query, members=3, seed=2))) == expected


def test_own_sql_sees_age_and_decayed_reward_of_incumbents() -> None:
    query = "SELECT trajectory_id FROM entries WHERE age <= 1 AND decayed_reward >= 0.5 ORDER BY trajectory_id"
    history: list[Scores] = [{"p-0": 1.0, "p-1": 0.75}, {"p-2": 0.5, "p-3": 0.25}, {"p-4": 0.25}]
    assert ids(snapshot(history[:1], buffer_rule(selection=query, members=2))) == ["p-0", "p-1"]
    assert ids(snapshot(history[:2], buffer_rule(selection=query, members=2))) == ["p-0", "p-2"]
    assert ids(snapshot(history, buffer_rule(selection=query, members=2))) == []


def test_own_sql_gives_a_snapshot_like_any_other() -> None:
    kept = snapshot([FOUR], buffer_rule(selection="SELECT trajectory_id FROM entries WHERE reward = 1"))
    assert kept.schema == BUFFERS
    [row] = kept.to_pylist()
    assert (row["run_id"], row["iteration"], row["prompt_id"], row["reward"], row["age"]) == (RUN, 0, "q", 1.0, 0)
    best = next(row for row in snapshot([FOUR], buffer_rule()).to_pylist() if row["prompt_id"] == "q")
    assert row == best


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT trajectory_id FROM nowhere", "replay.selection: .*nowhere.*does not exist"),
        ("SELECT trajectory_id FROM entries WHERE beauty > 1", "replay.selection: .*beauty"),
        ("SELECT CAST(trajectory_id AS INT) AS trajectory_id FROM entries", "replay.selection: .*Could not convert"),
        ("SELECT reward, age FROM entries", "must return one text column trajectory_id, it returned reward .double."),
        ("SELECT 'stranger' AS trajectory_id", r"replay.selection named trajectories that are no entries: \['stranger'\]"),
        ("SELECT NULL AS trajectory_id", "must return one text column trajectory_id"),
        ("SELECT trajectory_id, trajectory_id FROM entries", "must return one text column trajectory_id"),
        ("SELECT 7 AS trajectory_id", "must return one text column trajectory_id, it returned trajectory_id .int32."),
        ("SELECT column0 AS trajectory_id FROM read_csv('/etc/passwd')", "replay.selection: .*disabled"),
        ("SELECT content AS trajectory_id FROM read_text('/etc/passwd')", "replay.selection: .*disabled"),
        ("SELECT column0 AS trajectory_id FROM '/etc/passwd.csv'", "replay.selection: "),
        ("SELECT file AS trajectory_id FROM glob('/etc/*')", "replay.selection: .*disabled"),
    ],
)
def test_own_sql_that_is_refused(query: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=said) as caught:
        snapshot([FOUR], buffer_rule(selection=query))
    assert "replay.selection" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("DROP TABLE entries", "choose one of .*, or give SQL, one SELECT over the table entries; got 'DROP TABLE entries'"),
        ("DELETE FROM entries", "one SELECT over the table entries"),
        ("SELECT 1; SELECT 2", "one SELECT over the table entries"),
        ("", "one SELECT over the table entries"),
        ("WITH x AS (SELECT 1) DELETE FROM entries", "one SELECT over the table entries"),
        ("WITH x AS (COPY entries TO 'stolen.csv') FROM entries", "one SELECT over the table entries; .*COPY is refused"),
        ("FROM query('SELECT trajectory_id FROM entries')", "one SELECT over the table entries; .*function query is refused"),
        ("WITH x AS (DELETE FROM entries RETURNING *) FROM x", "one SELECT over the table entries; .*DELETE is refused"),
        ("COPY entries TO 'stolen.csv'", "one SELECT over the table entries"),
        ("SELEC trajectory_id FROM entries", "got 'SELEC trajectory_id FROM entries' .Parser Error: syntax error"),
    ],
)
def test_what_is_no_select_is_refused(query: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        snapshot([FOUR], buffer_rule(selection=query))


def test_own_sql_cannot_bring_back_what_is_in_quarantine() -> None:
    with pytest.raises(StoreError, match=r"no entries: \['q-1'\]"):
        snapshot([FOUR], buffer_rule(selection="SELECT 'q-1' AS trajectory_id"), excluded={"q-1"})


# -- what the prompt's latest group looked like --------------------------------------------------------------------------


def latest(table: pa.Table) -> dict[str, tuple[Any, Any]]:
    """prompt_id to fresh_mean and fresh_std, which its entries share."""
    told: dict[str, set[tuple[Any, Any]]] = {}
    for row in table.to_pylist():
        told.setdefault(row["prompt_id"], set()).add((row["fresh_mean"], row["fresh_std"]))
    assert all(len(values) == 1 for values in told.values()), told
    return {prompt: next(iter(values)) for prompt, values in told.items()}


def test_entries_carry_the_rewards_of_the_latest_fresh_members() -> None:
    """p is visited in iterations 0 and 2, q in 0 and 1. Continuations (c) do not count; the best of p is of iteration 0."""
    history: list[Scores] = [
        {"p-0": 1.0, "p-1": 0.0, "p-2": 0.5, "q-0": 0.25, "q-1": 0.75},
        {"q-2": 1.0, "q-3": 0.0, "q-c": 1.0},
        {"p-3": 0.25, "p-4": 0.125, "p-c": 0.75},
    ]
    rule = buffer_rule(1.0, members=2)
    after = [snapshot(history[: i + 1], rule, continuations=["q-c", "p-c"]) for i in range(3)]
    first = (0.5, pytest.approx(np.std([1.0, 0.0, 0.5])))
    assert latest(after[0]) == {"p": first, "q": (0.5, 0.25)}
    assert latest(after[1]) == {"p": first, "q": (0.5, 0.5)}  # p was not visited: what was known of it stays
    assert latest(after[2]) == {"p": (0.1875, 0.0625), "q": (0.5, 0.5)}
    assert by_prompt(after[2])["p"] == ["p-0", "p-c"]


def test_failed_rewards_are_no_fresh_rewards() -> None:
    rows = [located_row(f"p-{i}", prompt_id="p") for i in range(5)]
    scored = [reward_row(f"p-{i}", value) for i, value in enumerate([0.25, 0.75, math.nan, math.inf])]
    table = candidates(trajectories(rows), rewards([*scored, reward_row("p-4", None, error="the server was down")]))
    assert table.num_rows == 4
    assert latest(table) == {"p": (0.5, 0.25)}


def test_a_prompt_whose_fresh_members_all_failed_has_no_fresh_rewards() -> None:
    table = found({"p-0": math.nan, "p-c": 0.5}, continuations=["p-c"])
    assert latest(table) == {"p": (None, None)}
