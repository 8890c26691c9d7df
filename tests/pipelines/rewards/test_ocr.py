"""The OCR reward reads text that Pillow writes; the arithmetic around it is checked by hand and by axioms."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from opgrpo_data.io import checked_name
from pipelines.rewards.base import REWARDS, Media, Reward, Score
from pipelines.rewards.judge import judge
from pipelines.rewards.ocr import asked, distance, levenshtein

TEXTS = st.text(alphabet="ACT ?", max_size=7)


def written(text: str, size: int = 40, side: int = 512, ink: str = "black", ground: str = "white") -> Media:
    """A picture (side, side, 3) of `text` in Pillow's own TrueType font, `size` pixels high."""
    picture = Image.new("RGB", (side, side), ground)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(picture).text((side / 2, side / 2), text, ink, font, anchor="mm")
    return np.asarray(picture)


BLANK = np.full((512, 512, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def reward() -> Reward:
    return REWARDS.build("ocr")


def scored(reward: Reward, sample: Media, text: str) -> Score:
    return reward.score([sample], [f'a sign that says "{text}"'], [{}])[0]


@functools.cache
def recursive(a: str, b: str) -> int:
    """Edit distance by its definition: the best of replacing, deleting and inserting at the end."""
    if not a or not b:
        return len(a) + len(b)
    replaced = recursive(a[:-1], b[:-1]) + (a[-1] != b[-1])
    return min(replaced, recursive(a[:-1], b) + 1, recursive(a, b[:-1]) + 1)


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [
        ("", "", 0),
        ("CAT", "", 3),
        ("CAT", "COT", 1),
        ("CAT", "CT", 1),
        ("CAT", "CAAT", 1),
        ("CAT", "ACT", 2),
        ("KITTEN", "SITTING", 3),
    ],
)
def test_edit_distance_by_hand(a: str, b: str, edits: int) -> None:
    assert levenshtein(a, b) == edits


@given(a=TEXTS, b=TEXTS)
def test_edit_distance_is_the_recursive_one(a: str, b: str) -> None:
    assert levenshtein(a, b) == recursive(a, b)


@given(a=TEXTS, b=TEXTS, c=TEXTS)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("found", "target", "apart"),
    [
        ("stop", "stop", 0),
        ("nonstopbus", "stop", 0),
        ("shop", "stop", 1),
        ("sto", "stop", 1),
        ("", "stop", 4),
        ("a" * 99, "stop", 4),
    ],
)
def test_distance_forgives_text_around_and_counts_no_more_than_the_target(found: str, target: str, apart: int) -> None:
    assert distance(found, target) == apart


@pytest.mark.parametrize(
    ("prompt", "metadata", "target"),
    [
        ('a sign that says "Hello World" at night', {}, "helloworld"),
        ("a sign that says “Open 24 h” at night", {}, "open24h"),
        ('first "A b", then "C d"', {}, "ab"),
        ('a sign that says "Hello"', {"text": " New\nYork "}, "newyork"),
        ("no quotes", {"text": '5" pipe'}, '5"pipe'),
    ],
)
def test_what_is_asked_for(prompt: str, metadata: dict[str, str], target: str) -> None:
    assert asked(prompt, metadata) == target


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [("a red square", {}), ('a 5" pipe', {}), ('an empty sign: " "', {}), ('"Hello"', {"text": ""}), ('"Hello"', {"text": 7})],
)
def test_prompts_that_ask_for_no_text(prompt: str, metadata: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match=r"no text to look for in the prompt .*: put it between double quotes, or into metadata"
    ):
        asked(prompt, metadata)


@pytest.mark.parametrize("size", [10, 14, 24, 48, 96])
@pytest.mark.parametrize("text", ["STOP", "New York"])
def test_reads_small_and_large_text(reward: Reward, text: str, size: int) -> None:
    score = scored(reward, written(text, size), text)
    assert score.value == 1
    assert score.detail == {"found": text.replace(" ", "").lower(), "target": text.replace(" ", "").lower(), "distance": 0}


@pytest.mark.parametrize(("ink", "ground"), [("white", "black"), ("yellow", "navy"), ("red", "white"), ("#404040", "#c0c0c0")])
def test_reads_any_colours(reward: Reward, ink: str, ground: str) -> None:
    assert scored(reward, written("Coffee", ink=ink, ground=ground), "coffee").value == 1


@pytest.mark.parametrize("side", [64, 256, 1024])
def test_reads_pictures_of_any_size(reward: Reward, side: int) -> None:
    assert scored(reward, written("Sale", side // 4, side), "SALE").value == 1


def test_lines_are_read_from_top_to_bottom(reward: Reward) -> None:
    score = scored(reward, written("Happy\nBirthday\nAnna"), "Happy Birthday, Anna")
    assert score.detail["found"] == "happybirthdayanna"
    assert score.value == pytest.approx(1 - 1 / len("happybirthday,anna"))


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [
        ("SHOP", "STOP", 3 / 4),
        ("STOP SIGN", "STOP", 1),
        ("STOP", "STOP SIGN", 4 / 8),
        ("Coffee", "Tea", 0),  # 5 edits, of which no more count than the 3 letters
    ],
)
def test_partly_right_text(reward: Reward, text: str, target: str, value: float) -> None:
    score = scored(reward, written(text), target)
    assert score.value == pytest.approx(value)
    assert score.detail["found"] == text.replace(" ", "").lower()


def test_a_picture_without_text_scores_nothing(reward: Reward) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    for sample in (BLANK, noise, BLANK[:8, :8]):
        score = scored(reward, sample, "STOP")
        assert score.value == 0
        assert score.detail["distance"] == 4


def test_a_video_is_the_mean_over_the_read_frames_where_something_is_right(reward: Reward) -> None:
    """Of nine frames 0, 4 and 8 are read: right, nothing, one letter of four wrong."""
    video = np.stack([written("STOP"), *[written("GO")] * 3, BLANK, *[written("GO")] * 3, written("SHOP")])
    score = scored(reward, video, "STOP")
    assert score.value == pytest.approx((1 + 3 / 4) / 2)
    assert score.detail == {"found": ["stop", "", "shop"], "target": "stop", "distance": [0, 4, 1]}
    assert scored(reward, video[4:8], "STOP").value == 0
    json.dumps(dict(score.detail))


def test_every_frame_can_be_read() -> None:
    video = np.stack([BLANK, written("STOP"), BLANK])
    assert scored(REWARDS.build("ocr"), video, "STOP").value == 0
    assert scored(REWARDS.build("ocr", frame_interval=1), video, "STOP").value == 1


def test_one_prompt_without_text_costs_only_its_own_sample(reward: Reward) -> None:
    good, bad = judge(reward, [written("STOP")] * 2, ['"STOP"', "a red square"], [{}, {}])
    assert (good.value, good.error) == (1, None)
    assert good.detail == '{"distance":0,"found":"stop","target":"stop"}'
    assert bad.value is None
    assert str(bad.error).startswith("ValueError: no text to look for in the prompt 'a red square' with metadata {}")


def test_a_score_names_reader_model_and_options(reward: Reward) -> None:
    reader = rf"1-rapidocr{re.escape(version('rapidocr'))}-PP-OCRv\d+-[a-z]+"
    assert reward.name == "ocr"
    assert re.fullmatch(rf"{reader}-side320-every4", checked_name(reward.version, "version"))
    other = REWARDS.build("ocr", limit_side_len=736, frame_interval=2)
    assert re.fullmatch(rf"{reader}-side736-every2", other.version)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("limit_side_len", 31, "limit_side_len is a number of pixels, at least 32, got 31"),
        ("frame_interval", 0, "frame_interval is 1 to read every frame, 2 to read every other, and so on, got 0"),
    ],
)
def test_options_out_of_range(option: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REWARDS.build("ocr", **{option: value})


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'the reward ocr needs .*{package}.*: pip install "opgrpo\[ocr\]"'):
        REWARDS.build("ocr")


OFFLINE = """
import socket
def refuse(*_, **__): raise RuntimeError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
import numpy as np
from pipelines.rewards.base import REWARDS
blank = np.zeros((64, 64, 3), np.uint8)
assert REWARDS.build("ocr").score([blank], ['"STOP"'], [{}])[0].value == 0
"""


def test_it_needs_no_network_and_is_silent() -> None:
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
