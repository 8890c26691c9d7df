"""docs/format.md is a specification: its tables are the schemas, and the reader on it reads a store that opgrpo wrote."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from opgrpo_data import schema
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents, read_media
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store
from tests.opgrpo_data.factories import folder, records, shard_rows

PAGE = Path(__file__).parent.parent / "docs" / "format.md"
SCHEMAS = {name: value for name, value in vars(schema).items() if isinstance(value, pa.Schema) and not name.startswith("_")}


@pytest.fixture(scope="module")
def reader() -> types.ModuleType:
    """The code on the page, as a module."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 40
    assert "opgrpo" not in "".join(re.findall(r"^(?:from|import) .*", code, re.MULTILINE))
    module = types.ModuleType("reader")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module


def told_columns(section: str) -> dict[str, str]:
    """Columns and types of the table below a heading."""
    found: dict[str, str] = {}
    for text in re.split(r"^#+ ", PAGE.read_text(), flags=re.MULTILINE):
        if section in text.partition("\n")[0].replace("`", "").replace(",", "").split():
            found |= re.findall(r"^\| `(\w+)` \| (\S[^|]*) \|", text, re.MULTILINE)
    return found


@pytest.mark.parametrize("name", sorted(set(SCHEMAS) - {"LOCATION"}))
def test_tables_on_the_page_are_the_schemas(name: str) -> None:
    told = told_columns(name.lower())
    columns = {field.name: str(field.type).replace("item: ", "").replace("element: ", "") for field in SCHEMAS[name]}
    assert told.items() >= columns.items()
    assert name in ("POLICIES", "RUNS") or told == columns


def test_the_version_on_the_page_is_the_softwares() -> None:
    text = PAGE.read_text()
    assert f"# The store, format {schema.SCHEMA_VERSION}\n" in text
    assert f"\n| {schema.SCHEMA_VERSION} | " in text


def test_the_plain_reader_reads_what_we_read(finished: tuple[Path, dict[str, Any]], reader: types.ModuleType) -> None:
    store = Store.open(str(finished[0]))
    theirs = {row["trajectory_id"]: (row, latents, media) for row, latents, media in reader.trajectories(finished[0])}
    ours = shard_rows(store)
    assert theirs.keys() == {row["trajectory_id"] for row in ours}
    for row in ours:
        told, latents, media = theirs[row["trajectory_id"]]
        assert told == row
        location = LatentLocation.of(row)
        np.testing.assert_array_equal(latents, read_latents(store.directory, location, 0, len(location.checksums) - 1))
        assert media == read_media(store.directory, row)


def test_the_plain_reader_notices_damage(tmp_path: Path, reader: types.ModuleType) -> None:
    store = Store.create(str(tmp_path / "store"))
    write_shard(store.directory, folder(), "00000", records(2))
    [first, second] = shard_rows(store)
    with Path(store.directory.path(second["latents_file"])).open("r+b") as file:
        file.seek(second["latents_offset"] + second["latents_header"])
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    read = reader.trajectories(tmp_path / "store")
    assert next(read)[0] == first
    with pytest.raises(ValueError, match="t1 is damaged"):
        next(read)
