"""The README's table of measurements, made from benchmarks/results.

    python -m benchmarks.table                      # prints it
    python -m benchmarks.table --readme=README.md   # writes it between the markers there

Of every row the newest measurement on an H200 counts, and its commit stands beside it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

README = flags.DEFINE_string("readme", None, "The file to write the table into.")

RESULTS = Path(__file__).parent / "results"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
DEVICE = "NVIDIA H200"
HEAD = ("what", "measured", "share of the matmul rate", "PyTorch", "target", "commit",
        "command: `python -m benchmarks.…`")  # fmt: skip


class Line(NamedTuple):
    """A line of the table: what a row of `all.ROWS` measured, in words.

    `share` and `torch` name entries of the result, which may lack them: the share of the matmul
    rate that the same run measured, and what PyTorch needed, with a factor and a form to print it.
    """

    what: str
    row: str
    measured: Callable[[dict], str]
    target: str
    command: str
    share: str | None = None
    torch: tuple[str, float, str] | None = None


def _step(run: dict) -> str:
    return f"{run['seconds per step']:.2f} s, {run['peak GB']:.1f} GB"


def _operation(run: dict) -> str:
    return f"{run['forward and backward ms']:.1f} ms"


def _chunk(run: dict) -> str:
    return f"{run['ms per guided denoise step']:.0f} ms, {run['peak GB']:.1f} GB"


def _growth(run: dict) -> str:
    time, cache = (run[f"{what} at chunk 120 over here"] for what in ("time", "cache"))
    return f"{time:.3f} ×, {cache:.3f} ×"


def _per_call(run: dict, what: str) -> str:
    """Four latent frames a call, what a whole clip takes by default."""
    seconds = run[f"{what} by 4 s"]
    return f"{seconds:.2f} s"


_RATE, _STEP = "share of the matmul rate", "train_step --config.model.remat"
_NOT_KEPT = "keep_hidden=False"
_FAR = "sampling --steps=50 --far=120"

LINES = (
    Line("training step of `ar_chunk3f`, whole model, `selective`", "train_all", _step,
         "2.0 s", f"{_STEP}=selective --config.train.trainable=all", _RATE),
    Line("the same, layers unrolled, the last nine keep `dots`, no moving average",
         "train_all_unrolled", _step, "2.0 s", "all --rows=train_all_unrolled", _RATE),
    Line("the same, `full`", "train_all_full_remat", _step,
         "", f"{_STEP}=full --config.train.trainable=all", _RATE),
    Line("training step, attention modules, `selective`", "train_attn_only", _step,
         "1.7 s", f"{_STEP}=selective", _RATE),
    Line("the same, `dots`", "train_attn_only_dots", _step, "1.7 s", f"{_STEP}=dots", _RATE),
    Line("the same, layers unrolled, the last twelve keep `all_dots`, no moving average",
         "train_attn_only_unrolled", _step,
         "1.7 s", "all --rows=train_attn_only_unrolled", _RATE),
    Line("the same, `full`", "train_attn_only_full_remat", _step, "", f"{_STEP}=full", _RATE),
    Line("a LaCT block, forward and backward", "layer", _operation, "", "layer", _RATE),
    Line("LaCT operation, forward and backward", "lact_operation", _operation,
         "55 %", "lact_operation --torch", _RATE, ("torch ms", 1, "{:.1f} ms")),
    Line("the same computed again as in a step, hidden activations not kept", "lact_operation",
         lambda run: f"{run[f'{_NOT_KEPT}, forward and backward ms']:.1f} ms", "",
         "lact_operation --torch", f"{_NOT_KEPT}, {_RATE}"),
    Line("window attention, forward and backward", "window_attention", _operation,
         "60 %", "window_attention --torch", _RATE, ("torch ms", 1, "{:.1f} ms")),
    Line("guided denoise step of a chunk", "sampling", _chunk, "100 ms", _FAR, _RATE),
    Line("committing a chunk", "sampling", lambda run: f"{run['ms per commit']:.0f} ms",
         "", _FAR),
    Line("81 frames: 7 chunks, 50 guided steps each", "sampling",
         lambda run: f"{run['seconds for all chunks']:.1f} s", "40 s", _FAR),
    Line("chunk 120 over chunk 7: time of a step, bytes held", "sampling", _growth,
         "1.02 ×", _FAR),
    Line("VAE, encoding 81×480×832", "vae", lambda run: _per_call(run, "encode"),
         "1.5 s", "vae --torch", "encode by 4, share of the matmul rate",
         ("torch encode s", 1, "{:.2f} s")),
    Line("VAE, decoding it", "vae", lambda run: _per_call(run, "decode"),
         "1.5 s", "vae --torch", "decode by 4, share of the matmul rate",
         ("torch decode s", 1, "{:.2f} s")),
    Line("UMT5-XXL, 512 tokens", "umt5", lambda run: f"{1e3 * run['seconds']:.0f} ms",
         "", "umt5 --torch", _RATE, ("torch seconds", 1e3, "{:.0f} ms")),
)  # fmt: skip


def newest(folder: Path) -> dict[str, tuple[str, dict]]:
    """Row -> (commit, result) of its newest measurement on DEVICE in a folder of results.

    A result says when it was measured, or its file does for all of them.
    """
    found = [
        (run.get("measured", each.get("measured", "")), each["commit"], run)
        for each in map(json.loads, map(Path.read_text, folder.glob("*.json")))
        for run in each["runs"]
        if run["device"] == DEVICE
    ]
    found = sorted((what for what in found if what[0]), key=lambda what: what[0])
    return {run["row"]: (commit, run) for _, commit, run in found}


def make(folder: Path) -> str:
    """The table in Markdown, a line for each of LINES that has been measured."""
    measured = newest(folder)
    rows = [HEAD, ("---",) * len(HEAD)]
    for line in LINES:
        if line.row not in measured:
            continue
        commit, run = measured[line.row]
        share = f"{100 * run[line.share]:.0f} %" if line.share in run else ""
        name, factor, form = line.torch or (None, 1, "")
        torch = form.format(factor * run[name]) if name in run else ""
        rows.append((line.what, line.measured(run), share, torch, line.target, f"`{commit}`",
                     f"`{line.command}`"))  # fmt: skip
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def put_into(text: str, table: str, name: str) -> str:
    """`text` with the table between the markers; `name` is the file's, for the error."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{name} has no place for the table: put {START} and {END} into it")
    return f"{before}{START}\n{table}{END}{after}"


def main(_):
    table = make(RESULTS)
    print(table, end="")
    if README.value:
        path = Path(README.value)
        path.write_text(put_into(path.read_text(), table, str(path)))


if __name__ == "__main__":
    app.run(main)
