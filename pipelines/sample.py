"""Pictures of a policy in the store, for people to look at: the deterministic path, from seeded noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opgrpo_data import ids
from opgrpo_data.store import Store
from pipelines import media
from pipelines.evaluation import Sample, draw_samples
from pipelines.prompts import Prompt
from pipelines.restore import restore


def sample(
    store: Store,
    policy_id: str,
    prompts: Sequence[str],
    folder: Path,
    *,
    count: int,
    num_steps: int,
    seed: int,
    trust_code: bool = False,
) -> list[Path]:
    """Draw `count` samples of each prompt and write them as <prompt>-<sample>.png or .mp4; returns their paths.

    The noise of a sample depends on the seed, its prompt and its number alone: two policies can be compared. trust_code: see
    `restore`.
    """
    store.outside(str(folder))
    policy = restore(store, policy_id, trust_code=trust_code).policy
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and is no empty folder: choose another one")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, text in enumerate(prompts):
        prompt = Prompt(text, {})
        samples = [Sample(prompt, index, ids.derived_seed(seed, "sample", text, index)) for index in range(count)]
        for index, drawn in enumerate(samples):
            picture = draw_samples(policy, [drawn], num_steps)[0]
            media_format = media.format_of(picture, "png")
            path = folder / f"{number}-{index}.{media_format}"
            path.write_bytes(media.encode(picture, media_format))
            written.append(path)
    return written
