"""The tables and the plot of `lact_jax.experiments.memory`, and the file that they are made from.

Letters: G seeds, V noise levels, W chunks.
"""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from lact_jax.config import Config
from lact_jax.validation import NOISE_LEVELS
from lact_jax.workdir import write_atomically

RESULTS, TABLE, PLOT = "results.json", "table.md", "loss_by_chunk.png"
REFERENCE = "window"
SHOWN_LEVELS = (0.95, 0.75, 0.55)
# Chunks whose view has not been seen, one that continues to be new, and those seen before.
NEW, SEEN_AGAIN = slice(0, 2), slice(3, None)
VARIANT_PREFIX = "lact: "


def _part(config: Config) -> dict[str, Any]:
    """What of a config decides a row, as JSON gives it back."""
    sections = {n: dataclasses.asdict(getattr(config, n)) for n in ("model", "objective", "train")}
    return json.loads(json.dumps(sections | {"batch_size": config.data.batch_size}))


def _same(there: Any, here: Any, default: Any) -> bool:
    """Whether a row's config is this one. What it does not name was added later: its default."""
    if isinstance(here, dict) and isinstance(there, dict):
        return there.keys() <= here.keys() and all(
            _same(there[key], value, (default or {}).get(key))
            if key in there
            else value == (default or {}).get(key)
            for key, value in here.items()
        )
    if isinstance(here, list) and isinstance(there, list) and isinstance(default, list) and default:
        return len(here) == len(there) and all(
            _same(a, b, default[0]) for a, b in zip(there, here, strict=True)
        )
    return there == here


class Report:
    """The rows of a folder: read at the start, written again after each new one.

    Raises:
      ValueError: the folder's results are of other seeds, or damaged.
    """

    def __init__(self, folder: Path, seeds: tuple[int, ...]):
        self._folder, self._seeds = folder, seeds
        self._rows: dict[str, dict[str, Any]] = {}
        file = folder / RESULTS
        if file.exists():
            try:
                content = json.loads(file.read_text())
                found, self._rows = content["seeds"], content["rows"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{file} is damaged ({error!r}): delete it") from error
            if found != list(seeds):
                raise ValueError(
                    f"{file} is of seeds {found}, not {list(seeds)}: give another --out"
                )
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, name: str, config: Config) -> bool:
        """Whether there is a row of this name; ValueError where it is of another config."""
        if name not in self._rows:
            return False
        if not _same(self._rows[name]["config"], _part(config), _part(Config())):
            raise ValueError(
                f"{self._folder / RESULTS} has {name!r} with other settings (steps, sizes …): "
                "give another --out"
            )
        return True

    def add(self, name: str, changes: dict, config: Config, row: dict[str, Any]) -> None:
        """Takes a row, with its `loss` (G, V, W), and writes all files."""
        self._rows[name] = row | {"changes": changes, "config": _part(config)}
        content = {"seeds": self._seeds, "noise_levels": NOISE_LEVELS, "rows": self._rows}
        write_atomically(self._folder / RESULTS, json.dumps(content, indent=1) + "\n")
        write_atomically(self._folder / TABLE, self.table() + "\n")
        png = io.BytesIO()
        self.plot().savefig(png, dpi=130)
        write_atomically(self._folder / PLOT, png.getvalue())

    def losses(self, name: str, level: float) -> np.ndarray:
        """By seed and chunk: (G, W)."""
        return np.asarray(self._rows[name]["loss"], np.float64)[:, NOISE_LEVELS.index(level)]

    def table(self) -> str:
        """Markdown: all rows at the highest noise, then loss by chunk at SHOWN_LEVELS."""
        chunks = self.losses(next(iter(self._rows)), SHOWN_LEVELS[0]).shape[1]
        level, last = SHOWN_LEVELS[0], chunks - 1
        lines = [
            f"Validation loss at noise {level}: mean ± standard deviation over "
            f"{len(self._seeds)} seeds.",
            "",
            f"| model | parameters | memory of a layer | chunks 0–1 | chunk 2 | chunks 3–{last} | "
            f"chunks 0–1 to {REFERENCE} | chunks 3–{last} to {REFERENCE} | updates skipped |",
            "|---|---|---|---|---|---|---|---|---|",
            *(self._line(name, level) for name in self._rows),
        ]
        for level in SHOWN_LEVELS:
            lines += ["", f"Loss by chunk at noise {level}:", ""]
            lines += ["| model | " + " | ".join(str(i) for i in range(chunks)) + " |"]
            lines += ["|---" * (chunks + 1) + "|"]
            for name in self._rows:
                cells = [_spread(loss_G) for loss_G in self.losses(name, level).T]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def _line(self, name: str, level: float) -> str:
        row, loss_GW = self._rows[name], self.losses(name, level)
        parts = [loss_GW[:, NEW].mean(1), loss_GW[:, 2], loss_GW[:, SEEN_AGAIN].mean(1)]
        ratios = ["", ""]
        if REFERENCE in self._rows:
            window_GW = self.losses(REFERENCE, level)
            ratios = [_change(loss_GW[:, part], window_GW[:, part]) for part in (NEW, SEEN_AGAIN)]
        cells = [name, f"{row['parameters']:,}", f"{row['memory']:,}", *map(_spread, parts)]
        return "| " + " | ".join([*cells, *ratios, str(row["skipped"])]) + " |"

    def plot(self):
        """A matplotlib figure: loss by chunk of every mixer; beside it, where there are variants of
        lact, their mean loss at chunks seen again."""
        # Imported here: it takes half a second.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        variants = [n for n in self._rows if n.startswith(VARIANT_PREFIX)]
        mixers = [n for n in self._rows if n not in variants]
        columns = 2 if variants else 1
        figure = Figure(figsize=(7 * columns, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        self._draw_chunks(axes[0], mixers)
        if variants:
            self._draw_bars(axes[1], [*mixers, *variants])
        return figure

    def _draw_chunks(self, axes, names: list[str]) -> None:
        for name in names:
            loss_GW = self.losses(name, SHOWN_LEVELS[0])
            mean_W, std_W = loss_GW.mean(0), loss_GW.std(0)
            (line,) = axes.plot(mean_W, marker="o", label=name)
            spread = mean_W - std_W, mean_W + std_W
            axes.fill_between(range(len(mean_W)), *spread, alpha=0.2, color=line.get_color())
        axes.set(xlabel="chunk", ylabel=f"validation loss at noise {SHOWN_LEVELS[0]}")
        axes.legend()

    def _draw_bars(self, axes, names: list[str]) -> None:
        loss_NG = [self.losses(name, SHOWN_LEVELS[0])[:, SEEN_AGAIN].mean(1) for name in names]
        mean_N, std_N = np.mean(loss_NG, 1), np.std(loss_NG, 1)
        labels = [name.removeprefix(VARIANT_PREFIX) for name in names]
        axes.barh(labels, mean_N, xerr=std_N)
        axes.invert_yaxis()
        axes.set(xlabel=f"validation loss at noise {SHOWN_LEVELS[0]}, chunks seen before")


def _spread(values_G: np.ndarray) -> str:
    if not np.isfinite(values_G).all():
        return "diverged"
    return f"{values_G.mean():.3f} ± {values_G.std():.3f}"


def _change(loss_GW: np.ndarray, reference_GW: np.ndarray) -> str:
    change = loss_GW.mean() / reference_GW.mean() - 1
    return f"{change:+.1%}" if np.isfinite(change) else ""
