"""What a JSON file that people may have edited is to hold: shapes, and values held against them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from noisefit.base.errors import InputError

LARGEST = 2**53  # up to which every whole number is a float, and beyond all use
BEYOND = 1e100  # what is larger is no measurement


@dataclass(frozen=True)
class Value:
    """A shape that is no list and no object: what it is called, and whether a value is one."""

    name: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """A shape that may also be null or missing."""

    shape: Any


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < BEYOND  # of an int of any size, and not of NaN


COUNT = Value("a whole number from 0", lambda value: type(value) is int and 0 <= value <= LARGEST)
AMOUNT = Value("a number from 0", lambda value: _is_number(value) and value >= 0)
NUMBER = Value("a number", _is_number)
INDEX = Value("a layer's index", COUNT.holds)
TEXT = Value("text", lambda value: isinstance(value, str))
OBJECT = Value("an object", lambda value: isinstance(value, dict))
ANY = Value("anything", lambda value: True)
INTEGER = Value("a whole number", lambda value: type(value) is int and abs(value) < 2**63)
MEASURE = Value("a number or null", lambda value: False)  # NaN where it is null, missing, or beyond all measure
EACH = "*"  # the key of an object whose keys may be any


def checked(value: Any, shape: Any, where: str) -> Any:
    """A value in the shape that it is to have; keys that the shape does not name are passed over.

    Args:
        value: as `json.loads` gives it.
        shape: a `Value`; `Maybe(shape)`; `[shape]` for a list; `(shape,)` for a list that may be missing; a dictionary
            of keys to shapes, or of `EACH` to the shape of all.
        where: the file, and the place in it, for the line.

    Returns:
        The value; of an object the keys of the shape alone, of numbers floats where a `MEASURE` was expected.

    Raises:
        InputError: it has another shape; the line says where.
    """
    if shape is MEASURE and (value is None or type(value) in (int, float)):
        return float(value) if value is not None and abs(value) < BEYOND else math.nan
    if isinstance(shape, Maybe):
        return None if value is None else checked(value, shape.shape, where)
    if isinstance(shape, Value) and shape.holds(value):
        return float(value) if shape is NUMBER else value
    if isinstance(shape, tuple) and value is None:
        return []
    if isinstance(shape, (list, tuple)) and isinstance(value, list):
        return [checked(part, shape[0], f"{where}[{i}]") for i, part in enumerate(value)]
    if isinstance(shape, dict) and EACH in shape and value in (None, {}):
        return {}
    if isinstance(shape, dict) and isinstance(value, dict):
        keys = {key: shape.get(key, shape.get(EACH)) for key in (value if EACH in shape else shape)}
        lacking = [key for key, part in keys.items() if key not in value and not _may_be_missing(part)]
        require(not lacking, where, f"it lacks {lacking and lacking[0]!r}")
        return {key: checked(value.get(key), part, f"{where}: {key}") for key, part in keys.items()}
    raise InputError(f"{where}: expected {_name(shape)}, found {shown(value)}")


def require(holds: bool, where: str, what: str) -> None:
    """Raise `InputError` where something does not hold that is more than a shape."""
    if not holds:
        raise InputError(f"{where}: {what}")


def shown(value: Any) -> str:
    """The beginning of a value, as JSON."""
    text = json.dumps(value)[:64] if not isinstance(value, int) or abs(value) < 10**60 else f"{str(value)[:60]}..."
    return text if len(text) < 64 else f"{text[:60]}..."


def _may_be_missing(shape: Any) -> bool:
    return shape is MEASURE or isinstance(shape, (Maybe, tuple)) or (isinstance(shape, dict) and EACH in shape)


def _name(shape: Any) -> str:
    return shape.name if isinstance(shape, Value) else "an object" if isinstance(shape, dict) else "a list"
