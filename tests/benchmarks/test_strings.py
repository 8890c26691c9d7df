"""The world of strings: reader, rewards, prompts, and the pretrained pipeline that is there to be improved."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.strings import PIPELINE_DIR, PROMPTS, pretrain, reward, world
from pipelines.embedded import autoencoder
from pipelines.policies import sd3
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.prompts import load_prompts
from pipelines.rewards.base import REWARDS
from pipelines.rewards.ocr import levenshtein

MAX_BYTES = 6_000_000
EVERY = [p for split in world.PER_LENGTH for p in world.prompts(split)]
STRINGS = st.integers(3, 6).flatmap(lambda n: st.text(alphabet=world.ALPHABET, min_size=n, max_size=n))


@pytest.fixture(scope="module")
def policy() -> PipelinePolicy:
    return sd3.load(str(PIPELINE_DIR), max_sequence_length=0, device="cpu")


def test_reader_is_lossless_on_every_prompt() -> None:
    pictures = world.render([p.string for p in EVERY])
    assert pictures.shape == (512, 24, 24, 3)
    assert pictures.dtype == np.uint8
    assert world.read(pictures) == [p.string for p in EVERY]


def test_the_picture_is_the_font_in_reading_order() -> None:
    picture = world.render(["CATS"])[0]
    ink = (picture == world.INK).all(-1)
    assert ((picture == world.GROUND).all(-1) | ink).all()
    for at, letter in enumerate("CATS"):
        row, column = divmod(at, 3)
        cell = ink[8 * row : 8 * row + 7, 8 * column + 1 : 8 * column + 6]
        assert ["".join(".#"[int(pixel)] for pixel in line) for line in cell] == list(world.FONT[letter])
    assert ink.sum() == sum("".join(world.FONT[letter]).count("#") for letter in "CATS")


@given(string=STRINGS, seed=st.integers(0, 2**32 - 1), noise=st.integers(0, 40))
def test_reader_forgives_noise(string: str, seed: int, noise: int) -> None:
    clean = world.render([string]).astype(int)
    noisy = clean + np.random.default_rng(seed).integers(-noise, noise + 1, clean.shape)
    assert world.read(noisy.clip(0, 255).astype(np.uint8)) == [string]


def test_gaps_are_read_as_spaces_and_smears_as_unreadable() -> None:
    assert world.read(world.render([" CA  T", ""])) == [" CA  T", ""]
    smeared = world.render(["CAT"])
    smeared[:, :8, 8:16] = np.array(world.INK) // 2 + np.array(world.GROUND) // 2
    assert world.read(smeared) == ["C?T"]
    assert world.read(world.render(["CAT"])[:, :, ::-1])[0] != "CAT"


def test_any_two_glyphs_are_told_apart() -> None:
    masks = (world.glyphs() == world.INK).all(-1).reshape(len(world.ALPHABET) + 1, -1)
    apart = (masks[:, None] != masks[None]).sum(-1) + 64 * np.eye(len(masks), dtype=int)
    assert apart.min() == 4  # pixels of 64, root mean square 0.25: what READABLE is chosen by
    assert set(world.ALPHABET.lower()).isdisjoint("w")


@pytest.mark.parametrize(
    ("found", "wanted", "value"),
    [("", "", 1), ("CAT", "CAT", 1), ("CAT", "", 0), ("CAT", "CAAT", 3 / 4), ("KITTEN", "SITTING", 4 / 7)],
)
def test_similarity_by_hand(found: str, wanted: str, value: float) -> None:
    assert reward.similarity(found, wanted) == reward.similarity(wanted, found) == pytest.approx(value)


def test_rewards_are_built_by_name_and_agree() -> None:
    pictures, wanted = list(world.render(["CAT", "COT", "CATS"])), [{"string": "CAT"}] * 3
    prompts = [world.text("CAT")] * 3
    edit, exact = (REWARDS.build(f"benchmarks.strings.reward:{name}") for name in ("edit_distance", "exact"))
    assert (edit.name, edit.version, exact.name, exact.version) == ("string_edit", "1", "string_exact", "1")
    assert [s.value for s in edit.score(pictures, prompts, wanted)] == pytest.approx([1.0, 2 / 3, 3 / 4])
    assert [s.value for s in exact.score(pictures, prompts, wanted)] == [1.0, 0.0, 0.0]
    details = [s.detail for s in edit.score(pictures, prompts, wanted)]
    assert details == [s.detail for s in exact.score(pictures, prompts, wanted)]
    assert [(d["read"], d["exact"]) for d in details] == [("CAT", True), ("COT", False), ("CATS", False)]
    json.dumps(details)
    assert edit.score([], [], []) == []
    with pytest.raises(ValueError, match=r'needs metadata \{"string"'):
        edit.score(pictures[:1], prompts[:1], [{}])


def test_splits_are_disjoint_and_balanced() -> None:
    train, held_out = world.prompts("train"), world.prompts("held_out")
    assert Counter(len(p.string) for p in train) == dict.fromkeys(world.LENGTHS, 96)
    assert Counter(len(p.string) for p in held_out) == dict.fromkeys(world.LENGTHS, 32)
    assert len({p.string for p in train + held_out}) == 512
    assert all(p.text == f'write "{p.string}"' for p in train + held_out)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        world.prompts("test")  # type: ignore[arg-type]


def test_prompt_file_is_what_the_world_generates() -> None:
    assert PROMPTS.read_text() == world.prompt_file()
    loaded = load_prompts(str(PROMPTS))
    assert {split: len(prompts) for split, prompts in loaded.items()} == {"train": 384, "held_out": 128}
    assert [(p.text, p.metadata) for p in loaded["train"]] == [(p.text, {"string": p.string}) for p in world.prompts("train")]


@given(string=STRINGS, seed=st.integers(0, 2**32 - 1))
def test_near_misses_are_wrong_by_one_edit(string: str, seed: int) -> None:
    missed = pretrain.near_miss(string, np.random.default_rng(seed))
    swaps = {string[:i] + string[i : i + 2][::-1] + string[i + 2 :] for i in range(len(string))}
    assert missed != string
    assert levenshtein(missed, string) == 1 or missed in swaps


def test_folder_is_small_and_holds_nothing_that_can_run() -> None:
    files = [f for f in PIPELINE_DIR.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= MAX_BYTES
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".txt"}


def test_each_letter_is_one_token(policy: PipelinePolicy) -> None:
    tokenizer = policy.text_pipeline().tokenizer
    assert tokenizer.model_max_length == pretrain.MAX_TOKENS
    for prompt in EVERY:
        letters = list(prompt.string.lower())
        letters[-1] += "</w>"
        assert tokenizer.tokenize(prompt.text) == ["write</w>", '"</w>', *letters, '"</w>']


def test_autoencoder_is_lossless_for_the_reader(policy: PipelinePolicy) -> None:
    assert pretrain.lossless(policy.pipeline.vae, np.random.default_rng(0), count=400) >= 0.995
    latents = autoencoder.encode(policy.pipeline.vae, world.render([p.string for p in EVERY[:64]]))
    assert latents.shape == (64, *policy.latent_shape)


@torch.no_grad()
def test_the_policy_starts_where_its_log_says(policy: PipelinePolicy) -> None:
    log = json.loads((PIPELINE_DIR / "pretrain_log.json").read_text())
    assert log["lossless"] >= 0.995
    assert log["success_clean"]["held_out"]["exact"] >= 0.9
    logged = log["success_noisy"]["held_out"]
    assert 0.70 <= logged["edit"] <= 0.80
    assert 0.25 <= logged["exact"] <= 0.40
    chosen = world.prompts("held_out")
    condition = policy.encode([p.text for p in chosen])
    assert condition["embeds"].shape[1] == pretrain.MAX_TOKENS  # and no padding of an encoder that is not there
    x = torch.randn((len(chosen), *policy.latent_shape), generator=torch.Generator().manual_seed(1))
    sigmas = torch.from_numpy(policy.sigmas(10)).float()
    for now, following in itertools.pairwise(sigmas.unbind()):
        x = x + (following - now) * policy.velocity(x, now.expand(len(x)), condition)
    scores = reward.exact().score(policy.decode(x), [p.text for p in chosen], [{"string": p.string} for p in chosen])
    # 128 samples: at least three standard errors of the mean.
    assert np.mean([s.detail["edit"] for s in scores]) == pytest.approx(logged["edit"], abs=0.08)
    assert np.mean([s.value for s in scores]) == pytest.approx(logged["exact"], abs=0.125)
