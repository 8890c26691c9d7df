"""Names to factories: a short name of ours, or the import path `module:attribute` of anyone's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Builds things by name. The modules behind the names are imported only when asked for.

    as_factory: turns what an import path leads to into a factory, where that may be something else.
    """

    def __init__(
        self, kind: str, known: Mapping[str, str], as_factory: Callable[[Any], Callable[..., T]] = lambda found: found
    ) -> None:
        self.kind = kind
        self.known = dict(known)
        self.as_factory = as_factory

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
            _make_working_directory_importable()
            found = getattr(importlib.import_module(module_name), attribute)
        except Exception as error:  # users' modules fail in every way there is
            raise ValueError(f"cannot import {self.kind} {path!r}: {type(error).__name__}: {error}") from error
        try:
            built = self.as_factory(found)(**options)
        except ValueError:
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.kind} {name!r} cannot be built with options {options}: {told}") from error
        return built


def _make_working_directory_importable() -> None:
    """People keep their reward beside their config: an installed script would not look there, `python -m` does.

    It stays importable: the reward may import its own neighbours later. Last on the path, so that it shadows nothing.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
