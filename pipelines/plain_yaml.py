"""YAML as settings need it: values, lists, mappings. No tag builds objects, no alias multiplies, no key stands there twice."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

LONGEST = 256 * 1024
"""Characters. Reading more would take seconds."""
MOST_ALIASES = 100
MOST_VALUES = 10_000
"""Values, lists and mappings, those behind an alias counted each time."""
WIDEST = 256
"""Bits of a whole number. Python refuses to print numbers that are much longer."""


class _Plain(yaml.SafeLoader):
    """SafeLoader that bounds what aliases, merges (`<<`) and numbers can become, and refuses a key that replaces another."""

    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MOST_ALIASES:
                raise ComposerError(None, None, f"more than {MOST_ALIASES} aliases", None)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ComposerError(None, None, f"the key {key.value[:50]!r} stands there twice", key.start_mark)
                seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise ConstructorError(None, None, f"more than {MOST_VALUES} values are merged", node.start_mark)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = int(super().construct_yaml_int(node))
        if value.bit_length() > WIDEST:
            raise ConstructorError(None, None, f"a number of {value.bit_length()} bits", node.start_mark)
        return value


_Plain.add_constructor("tag:yaml.org,2002:int", _Plain.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """What a YAML document holds. Raises ValueError, in one line, for what is no YAML, too much, or too deep."""
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters, {LONGEST} at most are read")
    try:
        document = yaml.load(text, _Plain)  # noqa: S506 a SafeLoader
        _check_size(document)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, OverflowError) as error:  # as `!!bool maybe` raises KeyError
        raise ValueError(" ".join(str(error).split())[:500]) from error
    return document


def _check_size(document: Any) -> None:
    """An alias is one object in many places; whoever looks at it meets it in each."""
    left, waiting = MOST_VALUES, [document]
    while waiting:
        value = waiting.pop()
        if left == 0:
            raise ValueError(f"it holds more than {MOST_VALUES} values, or one that contains itself")
        left -= 1
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
