"""Names to factories: a short name of ours, or the import path `module:attribute` of anyone's."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Builds things by name. The modules behind the names are imported only when asked for."""

    def __init__(self, kind: str, known: Mapping[str, str]) -> None:
        self.kind = kind
        self.known = dict(known)

    def build(self, name: str, /, **options: Any) -> T:
        """Import the factory called `name` and call it with `options`.

        Raises ValueError when the name is unknown, the import path does not lead to a callable, or the factory does
        not take the options.
        """
        path = self.known.get(name, name)
        module_name, colon, attribute = path.partition(":")
        if not colon:
            raise ValueError(
                f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self.known))}; "
                f"or give the import path of your own as module:attribute"
            )
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import {self.kind} {path!r}: {error}") from error
        try:
            built: T = factory(**options)
        except TypeError as error:
            raise ValueError(f"{self.kind} {name!r} cannot be built with options {options}: {error}") from error
        return built
