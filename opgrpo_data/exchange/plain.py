"""Values of tables as JSON has them, and back: dates as ISO text, floats that JSON lacks as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pyarrow as pa

from opgrpo_data.schema import table_of

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value.isoformat() if isinstance(value, datetime) else value


def typed_row(values: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """The inverse, for a row: values of exactly the schema's types, None where there is none.

    Raises ValueError, KeyError, TypeError, OverflowError or pa.ArrowException when they are of others.
    """
    if unknown := set(values) - set(schema.names):
        raise ValueError(f"it has {sorted(unknown)[:3]}, which no table has")
    row = {name: _typed(value, schema.field(name).type) for name, value in values.items()}
    result: dict[str, Any] = table_of([row], schema).to_pylist()[0]
    return result


def _typed(value: Any, kind: pa.DataType) -> Any:
    if isinstance(value, list) and pa.types.is_list(kind):
        return [_typed(part, kind.value_type) for part in value]
    if pa.types.is_timestamp(kind) and value is not None:
        return datetime.fromisoformat(value)
    return _NOT_FINITE[value] if pa.types.is_floating(kind) and isinstance(value, str) else value
