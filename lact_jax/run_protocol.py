"""What the training log sees of a service that shows runs (Weights & Biases, TensorBoard)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Run(Protocol):
    """One run, open for logging."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Records the values of one step."""

    def show(self, step: int, images: Mapping[str, Path], videos: Mapping[str, Path]) -> None:
        """Records pictures (name -> PNG) and clips (caption -> mp4) of one step."""

    def finish(self) -> None:
        """Sends or writes what is left."""


class NoRun:
    """A service that is switched off."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def show(self, step: int, images: Mapping[str, Path], videos: Mapping[str, Path]) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


def by_element(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as one number an element ("name/0", …), numbers as they are."""
    flat = {}
    for name, value in values.items():
        items = value.tolist() if hasattr(value, "tolist") else value
        several = isinstance(items, list | tuple)
        flat |= {f"{name}/{i}": x for i, x in enumerate(items)} if several else {name: items}
    return flat
