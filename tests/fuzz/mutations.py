"""Damage to files: to their bytes, to the words of a text, and to nested values."""

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (
    "-1",
    "0",
    "1e308",
    "-1e308",
    "1e999",
    "nan",
    "-inf",
    "2147483648",
    "9" * 400,
    "0.1e-400",
)
WORDS = (*NUMBERS, "", "\0", "\udcff", "../../x", "/", "-", "é" * 300, "[" * 3000, "<" * 300)
_NUMBER = re.compile(rb"-?[0-9]+(\.[0-9]+)?")
_WORD = re.compile(rb"[^\s<>,:]+")
_DEEP = "@deep@"
VALUES: tuple[object, ...] = (
    *(None, True, False, -1, 0, 1, 1e308, -0.5, 2**31, 2**63, 10**400, float("nan")),
    *(float("-inf"), "", "\0", "1", "../x", "x" * 70_000, "\udcff", [], {}, [[]], [None], {"": 0}),
    *([0] * 5000, _DEEP),
)


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Applies up to four small changes at random places of a file."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Headers are short but matter most.
        reach = len(data) if rng.random() < 0.5 else min(len(data), 64)
        at = rng.randrange(reach + 1)
        length = rng.choice((1, 1, 2, 4, 16, 300))
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = rng.randbytes(length)
            case 4:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + length]
            case 5:
                del data[at:]
            case _:
                data[at : at + 4] = rng.randbytes(4)
    return bytes(data)


def damage_text(rng: random.Random, content: bytes) -> bytes:
    """Replaces numbers and words, repeats or removes lines, or damages bytes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        pattern = rng.choice((_NUMBER, _WORD))
        found = list(pattern.finditer(content))
        match rng.randrange(6):
            case 0 | 1 | 2 if found:
                place = rng.choice(found)
                words = NUMBERS if pattern is _NUMBER else WORDS
                new = rng.choice(words).encode(errors="surrogateescape")
                content = content[: place.start()] + new + content[place.end() :]
            case 3:
                lines = content.splitlines(keepends=True)
                rng.shuffle(lines)
                content = b"".join(lines[: rng.randrange(len(lines) + 1)] * rng.choice((1, 2)))
            case _:
                content = damage_bytes(rng, content)
    return content


def damage_values(
    rng: random.Random, value: Any, others: Callable[[Any], Sequence[object]] | None = None
) -> Any:
    """A copy of nested values with one of them replaced, removed or renamed.

    Args:
        others: more replacements for a value.
    """
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        copy: Any = value.copy()
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.12:
            del copy[key]
        elif isinstance(value, dict) and rng.random() < 0.05:
            copy[rng.choice(("", "x", 1))] = copy.pop(key)
        else:
            copy[key] = damage_values(rng, value[key], others)
        return copy
    return rng.choice((*VALUES, *(others(value) if others else ())))


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """Damages the values, or the text, of a JSON file."""
    if rng.random() < 0.25:
        return damage_text(rng, content)
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        value = damage_values(rng, value)
    text = json.dumps(value).replace(f'"{_DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.encode(errors="surrogateescape")


def damage_json_lines(rng: random.Random, content: bytes) -> bytes:
    """Damages one line."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = damage_json(rng, lines[at])
    return b"\n".join(lines)
