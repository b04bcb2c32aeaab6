"""A request's body to a JSON object, in time and memory that its size bounds.

Brackets and commas are counted before anything is built: Python's reader recurses once a level, and an object of a
million keys costs a hundred times its text.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from llava.serve.limits import ServeLimits
from llava.serve.problems import ApiError, invalid

# What lies between marks, then a string or a mark. Possessive, and the end optional: every byte is looked at once.
_MARKS = re.compile(rb'[^"\[\]{},]*+("[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},])?', re.DOTALL)


def read_object(body: bytes, limits: ServeLimits) -> dict[str, Any]:
    """The object that a body holds. Raises ApiError for anything else, NaN, too deep or too many values."""
    _check_shape(body, limits)
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except ApiError:
        raise
    except (ValueError, RecursionError):  # UnicodeDecodeError and numbers of 5,000 digits are ValueErrors
        raise invalid("invalid_json", "the body is not JSON; send one JSON object in UTF-8") from None
    if not isinstance(value, dict):
        raise invalid("invalid_json", "the body must be a JSON object with `model` and `messages`")
    return value


def _check_shape(body: bytes, limits: ServeLimits) -> None:
    depth = items = 0
    for match in _MARKS.finditer(body):
        mark = match[1]
        if mark in (b"[", b"{"):
            depth += 1
        elif mark in (b"]", b"}"):
            depth -= 1
        elif mark != b",":
            continue
        items += 1
        if depth > limits.max_depth:
            raise invalid("invalid_json", f"the body nests more than {limits.max_depth} levels of brackets")
        if items > limits.max_items:
            raise invalid("invalid_json", f"the body holds more than {limits.max_items} values")


def _refuse_constant(name: str) -> NoReturn:
    raise invalid("invalid_json", f"the body holds {name}, which is no JSON number")
