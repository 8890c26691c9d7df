"""What the JSON documents of a store must hold, so that nobody who reads one has to doubt it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pyarrow as pa

from opgrpo_data.schema import POLICIES, RUNS, table_of

DOCUMENT_KEYS: Mapping[str, frozenset[str]] = {
    "policies": frozenset({"policy_id", "created_at"}),
    "runs": frozenset({"run_id", "config", "command", "software", "created_at"}),
    "pins": frozenset({"run_id", "pinned_at"}),
}


def document_problem(path: str, document: Mapping[str, Any]) -> str | None:
    """What is wrong with a document of a run, a policy or a pin: keys it lacks, another's name, values of other types."""
    kind, _, name = path.removesuffix(".json").removesuffix("/policy").partition("/")
    if missing := sorted(DOCUMENT_KEYS[kind] - document.keys()):
        return f"lacks {missing}"
    key, moment = ("policy_id" if kind == "policies" else "run_id"), ("pinned_at" if kind == "pins" else "created_at")
    if document[key] != name:
        return f"is of {str(document[key])[:200]!r}"
    try:
        told = datetime.fromisoformat(document[moment])
        if told.tzinfo is None:
            raise ValueError(f"{moment} {document[moment]} has no time zone")
        if kind == "policies":
            row = {column: document.get(column) for column in POLICIES.names if column != "has_weights"}
            table_of([row | {moment: told}], POLICIES)
        elif kind == "runs":
            config = document["config"]
            if not (
                isinstance(config, dict) and isinstance(document["command"], list) and isinstance(document["software"], dict)
            ):
                raise ValueError("config, command and software must be an object, a list and an object")
            table_of([{"name": config.get("name"), "seed": config.get("seed"), moment: told}], RUNS)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        return f"holds what it cannot ({' '.join(str(error).split())[:200]})"
    return None
