"""The replay buffer: iteration by iteration it holds, per prompt, the best decayed reward of all history."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opgrpo_data.buffer import BufferRule, candidates, select
from opgrpo_data.schema import BUFFERS
from tests.opgrpo_data.factories import RUN, buffer_rule, located_row, no_buffer, reward_row, rewards, trajectories


@dataclass(frozen=True)
class Scored:
    """One trajectory of the history."""

    trajectory_id: str
    prompt_id: str
    born: int
    reward: float | None
    quarantined: bool = False


def found(members: list[Scored]) -> pa.Table:
    """The candidates that the trajectories and rewards of one iteration make."""
    rows = [located_row(m.trajectory_id, prompt_id=m.prompt_id, iteration=m.born) for m in members]
    return candidates(trajectories(rows), rewards({m.trajectory_id: m.reward for m in members}))


def snapshots(history: list[list[Scored]], rule: BufferRule, excluded: set[str] | None = None) -> list[pa.Table]:
    """The buffer after each iteration, each made from the one before."""
    made = [no_buffer()]
    for iteration, members in enumerate(history):
        made.append(select(made[-1], found(members), excluded or set(), run_id=RUN, iteration=iteration, rule=rule))
    return made[1:]


def decayed(scored: Scored, iteration: int, rule: BufferRule) -> Fraction:
    """The decayed reward, exactly. A negative one decays away from zero: age never makes an entry look better."""
    assert scored.reward is not None
    reward, decay, age = Fraction(scored.reward), Fraction(rule.decay), iteration - scored.born
    if rule.decay_form == "linear":
        return reward - decay * age
    return reward * decay**age if reward >= 0 else reward / decay**age


def best_of_all_history(history: list[list[Scored]], iteration: int, rule: BufferRule) -> dict[str, Scored]:
    """By prompt: the brute-force answer, over everything up to and including `iteration`."""
    usable = [
        scored
        for members in history[: iteration + 1]
        for scored in members
        if scored.reward is not None and math.isfinite(scored.reward) and not scored.quarantined
    ]
    best: dict[str, Scored] = {}
    for scored in sorted(usable, key=lambda s: (-decayed(s, iteration, rule), -s.born, s.trajectory_id)):
        best.setdefault(scored.prompt_id, scored)
    return best


# Eighths and powers of one half: decayed rewards are exact in float64, so that ties are ties in every arithmetic.
EXACT_REWARDS = st.integers(-16, 16).map(lambda n: n / 8) | st.sampled_from([None, math.nan, math.inf, -math.inf])
RULES = st.builds(buffer_rule, st.sampled_from([1.0, 0.5, 0.25])) | st.builds(
    buffer_rule, st.sampled_from([0.0, 0.125, 0.5]), decay_form=st.just("linear")
)


@st.composite
def histories(draw: st.DrawFn) -> list[list[Scored]]:
    """1..6 iterations of 0..6 trajectories on three prompts; ids in no particular order."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    names = iter(draw(st.permutations([f"t{n:02d}" for n in range(sum(sizes))])))
    prompts, kept = st.sampled_from(["p", "q", "r"]), st.sampled_from([False, False, False, True])
    return [
        [Scored(next(names), draw(prompts), born, draw(EXACT_REWARDS), draw(kept)) for _ in range(size)]
        for born, size in enumerate(sizes)
    ]


@settings(max_examples=15, deadline=None)
@given(history=histories(), rule=RULES)
def test_step_by_step_selection_is_the_best_of_all_history(history: list[list[Scored]], rule: BufferRule) -> None:
    excluded = {scored.trajectory_id for members in history for scored in members if scored.quarantined}
    for iteration, snapshot in enumerate(snapshots(history, rule, excluded)):
        expected = best_of_all_history(history, iteration, rule)
        assert snapshot.schema == BUFFERS
        rows = snapshot.to_pylist()
        assert [row["prompt_id"] for row in rows] == sorted(expected)
        for row in rows:
            best = expected[row["prompt_id"]]
            assert row["trajectory_id"] == best.trajectory_id
            assert (row["run_id"], row["iteration"]) == (RUN, iteration)
            assert (row["reward"], row["born_iteration"], row["age"]) == (best.reward, best.born, iteration - best.born)
            assert Fraction(row["decayed_reward"]) == decayed(best, iteration, rule)


@settings(max_examples=10, deadline=None)
@given(
    values=st.lists(st.lists(st.floats(-1e3, 1e3), max_size=4), min_size=1, max_size=5),
    rule=st.builds(buffer_rule, st.floats(0.5, 1.0))
    | st.builds(buffer_rule, st.floats(0.0, 2.0), decay_form=st.just("linear")),
)
def test_with_any_numbers_the_choice_is_best_up_to_rounding(values: list[list[float]], rule: BufferRule) -> None:
    history = [[Scored(f"t{born}-{i}", "p", born, value) for i, value in enumerate(row)] for born, row in enumerate(values)]
    last = len(history) - 1
    rows = snapshots(history, rule)[-1].to_pylist()
    best = best_of_all_history(history, last, rule)
    assert len(rows) == len(best)
    if rows:
        assert rows[0]["decayed_reward"] == pytest.approx(float(decayed(best["p"], last, rule)), rel=1e-12, abs=1e-9)


def test_golden_history() -> None:
    """R = 1.0 at birth, decay 0.9: beaten by 0.8 after three iterations (0.729), not after two (0.81)."""
    history = [
        [Scored("old", "p", 0, 1.0)],
        [Scored("a", "p", 1, 0.8)],  # 0.9 stays
        [Scored("b", "p", 2, 0.8)],  # 0.81 stays
        [Scored("c", "p", 3, 0.8)],  # 0.729 goes
    ]
    kept = [snapshot.to_pylist() for snapshot in snapshots(history, buffer_rule(0.9))]
    assert [row["trajectory_id"] for [row] in kept] == ["old", "old", "old", "c"]
    assert [row["decayed_reward"] for [row] in kept] == pytest.approx([1.0, 0.9, 0.81, 0.8])
    linear = snapshots(history, buffer_rule(0.05, decay_form="linear"))
    assert [table["decayed_reward"][0].as_py() for table in linear] == pytest.approx([1.0, 0.95, 0.9, 0.85])
    assert linear[-1]["trajectory_id"].to_pylist() == ["old"]


@pytest.mark.parametrize("rule", [buffer_rule(0.9), buffer_rule(0.1, decay_form="linear")], ids=str)
@pytest.mark.parametrize("reward", [-2.0, -0.5, 0.0, 0.5, 2.0])
def test_age_never_makes_an_entry_look_better(rule: BufferRule, reward: float) -> None:
    history = [[Scored("t", "p", 0, reward)], [], [], []]
    values = [snapshot["decayed_reward"][0].as_py() for snapshot in snapshots(history, rule)]
    assert values == sorted(values, reverse=True)
    assert values[0] == reward


def test_of_equals_the_newer_stays_and_then_the_smaller_id() -> None:
    undecayed = buffer_rule(1.0)
    history = [[Scored("m", "p", 0, 1.0), Scored("k", "p", 0, 1.0)], [Scored("a", "p", 1, 1.0)]]
    assert [table["trajectory_id"].to_pylist() for table in snapshots(history, undecayed)] == [["k"], ["a"]]


def test_an_entry_keeps_all_that_a_continuation_needs() -> None:
    row = located_row("t", prompt_id="p", behaviour_logprob=[-1.5, -2.5, -3.5], noise_seeds=[5, 6, 2**62], noise_level=0.3)
    first = select(
        no_buffer(),
        candidates(trajectories([row]), rewards({"t": 1.0})),
        set(),
        run_id=RUN,
        iteration=0,
        rule=buffer_rule(),
    )
    later = select(first, no_buffer(), set(), run_id="another run", iteration=5, rule=buffer_rule())
    kept = later.to_pylist()[0]
    carried = [name for name in BUFFERS.names if name in row and name not in ("run_id", "iteration")]
    assert "latents_crc32" in carried
    assert {name: kept[name] for name in carried} == {name: row[name] for name in carried}
    assert (kept["run_id"], kept["iteration"], kept["born_iteration"], kept["age"]) == ("another run", 5, 0, 5)


def test_only_scored_trajectories_are_candidates() -> None:
    rows = [located_row(name) for name in ("scored", "failed", "unscored")]
    values = [reward_row("scored", 1.0), reward_row("failed", None, error="no face found"), reward_row("elsewhere", 9.0)]
    table = candidates(trajectories(rows), rewards(values))
    assert table.schema == BUFFERS
    assert [(row["trajectory_id"], row["reward"], row["born_iteration"]) for row in table.to_pylist()] == [("scored", 1.0, 0)]


def test_an_incumbent_that_is_quarantined_later_makes_room() -> None:
    rule = buffer_rule(1.0)
    [first] = snapshots([[Scored("damaged", "p", 0, 9.0)]], rule)
    newcomer = found([Scored("new", "p", 1, 0.1)])
    kept = select(first, newcomer, {"damaged"}, run_id=RUN, iteration=1, rule=rule)
    assert kept["trajectory_id"].to_pylist() == ["new"]
    empty = select(first, no_buffer(), {"damaged"}, run_id=RUN, iteration=1, rule=rule)
    assert empty.equals(no_buffer())


def test_nothing_selected_from_nothing() -> None:
    assert select(no_buffer(), no_buffer(), set(), run_id=RUN, iteration=0, rule=buffer_rule()).equals(no_buffer())
