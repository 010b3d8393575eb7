"""The one error of this package, and how long lists of tensors are told in few lines."""

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class ConversionError(ValueError):
    """A checkpoint can't be converted or loaded; the message says which file or tensor, and why."""


def in_few_lines(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Lines "name: text", those alike in all but a layer's number put together.

    ("blocks.0.x.w", t), ("blocks.1.x.w", t), … become "blocks.{0-29}.x.w: t".
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for name, text in pairs:
        number = _NUMBER.search(name)
        key = name if number is None else f"{name[: number.start()]}*{name[number.end() :]}"
        groups.setdefault((key, text), []).extend([] if number is None else [int(number[0])])
    return [
        f"{name.replace('*', _ranges(numbers), 1) if numbers else name}: {text}"
        for (name, text), numbers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """[3] -> "3"; [0, 1, 2, 5] -> "{0-2,5}"."""
    spans: list[list[int]] = []
    for n in sorted(set(numbers)):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    text = ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)
    return text if text.isdigit() else f"{{{text}}}"
