"""A store's data in other forms and back: datasets for other tools, and what other stores hold (docs/exchange.md).

export.py       which forms there are, and the manifest of what was written
target.py       where a dataset goes: claimed, filled, finished, or begun anew
selection.py    which trajectories an export takes, and which it leaves out
reward_keys.py  which reward is meant by NAME or NAME@VERSION
webdataset.py   plain WebDataset, written and read: the only dataset that can come back
tables.py       Parquet with pictures inside: huggingface, sft, preferences
card.py         the dataset card beside them
left_out.py     what was not taken, counted by reason
plain.py        values as JSON has them, and back
receive.py      where imported trajectories and rewards go, and which are there already
importing.py    what a source is; trajectories out of tars
stores.py       import of another store; store_shards.py: of its trajectories
checks.py       what is checked of data from outside
listing.py      what the runs of a store hold
"""

from __future__ import annotations

from opgrpo_data.exchange.export import export_dataset
from opgrpo_data.exchange.importing import import_dataset
from opgrpo_data.exchange.listing import listing

__all__ = ["export_dataset", "import_dataset", "listing"]
