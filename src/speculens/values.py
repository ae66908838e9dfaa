"""A dataclass from plain values, as YAML and JSON give them, and what is wrong with them in one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from speculens.errors import UserError

T = TypeVar("T")


def read(kind: type[T], values: Any, name: str) -> T:
    """A dataclass whose fields are plain values, dataclasses, tuples or mappings of them.

    name  what messages call the whole: `The recipe`
    Raises UserError on unknown keys (naming the nearest known one), missing ones and values of another type.
    """
    return _section(kind, values, name, "")


def one_of(where: str, value: str, known: Sequence[str]) -> None:
    """Raise UserError unless a value is a known one."""
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
        raise UserError(f"{where} {value!r} is unknown; did you mean {near}? Known: {', '.join(known)}.")


def _section(cls: type[T], values: Any, name: str, where: str) -> T:
    if not isinstance(values, Mapping):
        raise UserError(f"{where.rstrip('.') or name} must be a section of keys and values, not {values!r}.")
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise UserError(f"{name} has an unknown key {where}{key}; did you mean {where}{near[0]}?")
    missing = [
        f"{where}{key}"
        for key, f in fields.items()
        if key not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{name} lacks {', '.join(missing)}.")
    return cls(**{key: _value(hints[key], value, name, f"{where}{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, name: str, where: str) -> Any:  # noqa: PLR0911 - one line a type
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = next(a for a in arguments if a is not types.NoneType)
        return None if value is None else _value(inner, value, name, where)
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, name, f"{where}.")  # type: ignore[arg-type]
    if origin is tuple:
        return _tuple(arguments, value, name, where)
    if hint is float:
        return _float(value, name, where)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: _value(arguments[1], one, name, f"{where}.{key}") for key, one in value.items()}
    if hint is Any:
        return value
    raise _wrong(where, name, _kind(hint), value)


def _tuple(arguments: tuple[Any, ...], value: Any, name: str, where: str) -> tuple[Any, ...]:
    many = arguments[-1] is Ellipsis
    values = value if isinstance(value, (list, tuple)) else [value]  # one file may stand without brackets
    if not many and len(values) != len(arguments):
        raise _wrong(where, name, f"{len(arguments)} values", value)
    kinds = [arguments[0]] * len(values) if many else arguments
    return tuple(_value(kind, one, name, where) for kind, one in zip(kinds, values, strict=True))


def _float(value: Any, name: str, where: str) -> float:
    """A number; YAML 1.1 reads `1e-3` as text, people do not."""
    if not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            return float(value)
        except ValueError:
            pass
    raise _wrong(where, name, "a number", value)


def _wrong(where: str, name: str, kind: str, value: Any) -> UserError:
    return UserError(f"{name}: {where} must be {kind}, not {value!r}.")


def _kind(hint: Any) -> str:
    return {int: "a whole number", bool: "true or false", str: "a text"}.get(hint, "a section of keys and values")
