"""The dataset card: a README.md that Hugging Face reads and people do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.selection import Selection

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
MADE_BY = ("base_model", "sampler", "num_steps", "noise_level", "guidance_scale")
TITLES = {
    "huggingface": "Pictures and their rewards",
    "preferences": "Preferences between pictures of one prompt",
    "sft": "Pictures for supervised fine-tuning",
}

ORIGIN = "Exported from a store of\nopgrpo as"

CARD = """---
{head}---

# {title}

{rows} rows, drawn by generative models for {prompts} prompts and judged by automatic rewards. {origin} `{form}`{condition}.

```python
from datasets import load_dataset

dataset = load_dataset("this folder", split="train")
```

## Columns

| column | type | |
| --- | --- | --- |
{columns}

## How it was made

{trajectories} trajectories of {runs} runs match; {continued} of them continue the first steps of an earlier one. They were
drawn by {policies} states of a policy that was being trained meanwhile, from these models:

| {made_by} | trajectories |
|{rule}
{made}

{rewards}

Left out: {left_out}.

## Licence and limitations

No licence is stated: whoever publishes this adds `license:` to the head of this file, and minds the licences of the models
above and of the prompts. Pictures and judgements were made by machines, and no person has looked at them. A policy in training
learns what its reward likes, mistakes included: a high value says that this reward was pleased and nothing more. Pictures of
one group share their prompt, and continuations their first steps: they are not independent.
"""


@dataclass(frozen=True)
class Column:
    """A column of a dataset. about: a phrase for the card. media: its Hugging Face feature, where that is no plain value."""

    name: str
    type: pa.DataType
    about: str
    media: dict[str, str] | None = None

    @property
    def feature(self) -> dict[str, str]:
        """As Hugging Face describes it in a file's schema."""
        return self.media or {"dtype": self.dtype, "_type": "Value"}

    @property
    def dtype(self) -> str:
        """As Hugging Face names its type."""
        return self.media["_type"].lower() if self.media else str(self.type).replace("double", "float64")


def card(selection: Selection, form: str, columns: Sequence[Column], rows: int, size: int, left_out: LeftOut) -> str:
    """The text of README.md for a dataset of `rows` rows with `size` bytes of media."""
    [told] = selection.ask(
        "count(DISTINCT trajectory_id) AS trajectories, count(DISTINCT prompt_id) AS prompts, count(DISTINCT run_id) AS runs, "
        "count(DISTINCT policy_id) AS policies, count(DISTINCT trajectory_id) FILTER (WHERE parent_id IS NOT NULL) AS continued"
    )
    names = ", ".join(MADE_BY)
    made = selection.ask(f"{names}, count(DISTINCT trajectory_id) AS n", "GROUP BY ALL ORDER BY ALL")
    return CARD.format(
        head=yaml.safe_dump(_head(form, columns, rows, size), sort_keys=False),
        title=TITLES[form],
        origin=ORIGIN,
        form=form,
        rows=rows,
        condition="" if selection.where is None else f", those for which {_code(selection.where)}",
        columns="\n".join(f"| `{column.name}` | {column.dtype} | {column.about} |" for column in columns),
        made_by=" | ".join(MADE_BY),
        rule=" --- |" * (len(MADE_BY) + 1),
        made="\n".join(f"| {' | '.join(_code(value) for value in row.values())} |" for row in made),
        rewards=_rewards(selection),
        left_out=left_out.told(),
        **told,
    )


def is_card(data: bytes) -> bool:
    """Whether a README.md is such a card, and not somebody's own."""
    return ORIGIN.encode() in data


def _head(form: str, columns: Sequence[Column], rows: int, size: int) -> dict[str, Any]:
    return {
        "pretty_name": TITLES[form],
        "task_categories": ["text-to-image" if any(column.dtype == "image" for column in columns) else "text-to-video"],
        "tags": ["opgrpo", "flow-matching", "reinforcement-learning"],
        "size_categories": [next((name for limit, name in SIZES if rows < limit), "n>10M")],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
        "dataset_info": {
            "features": [{"name": column.name, "dtype": column.dtype} for column in columns],
            "splits": [{"name": "train", "num_examples": rows, "num_bytes": size}],
        },
    }


def _rewards(selection: Selection) -> str:
    if selection.reward is None:
        return "All rewards that the store has of them stand in the column `rewards`."
    [told] = selection.ask("count(value) AS scored, min(value) AS least, avg(value) AS mean, max(value) AS most")
    if not told["scored"]:
        return f"The reward {_code(selection.reward)} has judged none of them."
    return (
        f"The reward {_code(selection.reward)} has judged {told['scored']} of them: from {told['least']:.4g} to "
        f"{told['most']:.4g}, {told['mean']:.4g} on average."
    )


def _code(value: object) -> str:
    """Text from outside in a line of Markdown: it can end neither the code nor the line nor the cell of a table."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("|", "/") + "`"
