"""Recipes as text: `name(field=value,...)`, as typed on the command line."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from sparing.errors import InvalidInputError, UnknownNameError


def parse_call(text: str, what: str) -> tuple[str, dict[str, str]]:
    """The name and the fields in `name` or `name(field=value,...)`.

    Args:
        what: what the text names, for messages.

    Raises:
        InvalidInputError: text that does not follow the grammar.
    """
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", text)
    if match is None:
        raise InvalidInputError(what, text, "name or name(field=value)")
    fields: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in (match.group(2) or "").split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise InvalidInputError(what, text, "fields written as name=value")
        if key.strip() in fields:
            raise InvalidInputError(what, text, "each field once")
        fields[key.strip()] = value.strip().strip("'\"")
    return match.group(1), fields


def build(recipe: type, fields: dict[str, Any], name: str) -> Any:
    """An object of the dataclass `recipe` with the given fields.

    Raises:
        UnknownNameError: it has no such field. InvalidInputError: a value that the field does not take.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(recipe) if f.init}
    kinds = {f.name: str(f.type) for f in dataclasses.fields(recipe)}
    values = dict(fields)
    for key, text in fields.items():
        if key not in defaults:
            raise UnknownNameError(f"field of {name}", key, defaults)
        default = defaults[key]
        value = values[key] = _literal(text) if isinstance(text, str) and not isinstance(default, str) else text
        if key == "keep":  # checked by the method, which takes several types
            continue
        if kinds[key] in ("int | None", "int | tuple[int, ...] | None") and (value is None or type(value) is int):
            continue
        if kinds[key] == "float | None" and (value is None or type(value) in (int, float)):
            values[key] = None if value is None else float(value)
            continue
        if not isinstance(default, bool | int | float | str):
            if not isinstance(text, str):  # an object already
                continue
            raise InvalidInputError(f"{name}.{key}", value, "an object", "build the method in Python to set it")
        if kinds[key] == "int | float" and type(value) in (int, float):  # a number and a share mean different things
            continue
        if isinstance(default, float) and type(value) is int:
            values[key] = float(value)
        elif type(value) is not type(default):
            raise InvalidInputError(f"{name}.{key}", value, f"a value of type {type(default).__name__}")
    return recipe(**values)


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
