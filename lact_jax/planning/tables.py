"""Plans as text: the tables that `python -m lact_jax.plan` prints, and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lact_jax.planning.bounds import Bounds, bounds, exchanges
from lact_jax.planning.cards import GPUS_PER_NODE, USABLE, Card
from lact_jax.planning.measure import Measured
from lact_jax.planning.search import Choice, Plan, Shape, nearest_fitting, ranked, sweep


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row):
        first, *rest = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, (cells[0], rule, *cells[1:])))


def gigabytes(count: int) -> str:
    """Bytes in GB (10^9), two decimals."""
    return f"{count / 1e9:.2f}"


def milliseconds(seconds: float) -> str:
    """Seconds in ms."""
    return f"{1e3 * seconds:.1f}"


def memory_table(measured: Measured, card: Card) -> str:
    """What fills a device while a program runs."""
    parts = measured.state | {
        "gradients": measured.gradients,
        "kept for the backward pass": measured.kept,
        "working memory": measured.working,
        "results": measured.outputs,
        "**together**": measured.peak,
        f"usable of an {card.name.upper()} ({USABLE:.0%})": card.usable,
    }
    rows = [(name, gigabytes(size)) for name, size in parts.items() if size]
    return table((f"{measured.program}, GB a device", "GB"), rows)


def exchange_table(measured: Measured, card: Card) -> str:
    """The collectives of a program; '' where there are none."""
    rows = [
        (
            row.kind, row.place, str(row.devices), row.link, str(row.count), gigabytes(row.bytes),
            milliseconds(row.seconds),
        )
        for row in exchanges(measured, card)
    ]  # fmt: skip
    header = ("collective", "place", "devices", "over", "times", "GB", "at least ms")
    return table(header, rows) if rows else ""


def bound_table(measured: Measured, card: Card) -> str:
    """FLOPs and the least times of a program."""
    limits = bounds(measured, card)
    rows = [
        ("model TFLOPs a device", f"{measured.model_flops / 1e12:.1f}"),
        ("TFLOPs with what is repeated", f"{measured.flops / 1e12:.1f}"),
        ("compute, at least ms", milliseconds(limits.compute)),
        ("memory, at least ms", milliseconds(limits.memory)),
        ("communication, at least ms", milliseconds(limits.communication)),
        ("all, at least ms", milliseconds(limits.seconds)),
    ]
    return table((measured.program, ""), rows)


def assumptions(card: Card) -> str:
    """The numbers behind the bounds."""
    return (
        f"{card.name.upper()}: {card.memory / 1e9:.1f} GB, {card.flops / 1e12:.0f} TFLOP/s (dense "
        f"bf16), {card.bandwidth / 1e12:.2f} TB/s; NVLink {card.nvlink / 1e9:.0f} GB/s and network "
        f"{card.network / 1e9:.0f} GB/s a GPU in each direction, nodes of {GPUS_PER_NODE}"
    )


def verdict(plan: Plan, card: Card) -> str:
    """Whether a plan fits, in a sentence."""
    word = "fits" if plan.fits else "DOES NOT FIT"
    return (
        f"{plan.choice}, {plan.clips} clips: {word}, {gigabytes(plan.peak)} GB of "
        f"{gigabytes(card.usable)} GB; at least {plan.seconds_per_clip:.3f} s a clip"
    )


def plan_text(plan: Plan, card: Card) -> str:
    """Everything about one plan."""
    parts = [verdict(plan, card)]
    for measured in plan.programs:
        parts += [
            memory_table(measured, card), exchange_table(measured, card),
            bound_table(measured, card),
        ]  # fmt: skip
    return "\n\n".join(filter(None, [*parts, assumptions(card)]))


def sweep_text(plans: Sequence[Plan], card: Card) -> str:
    """One row a plan, in the order given."""

    def ms(limits: Bounds, clips: int):
        times = limits.compute, limits.memory, limits.communication, limits.seconds
        return (milliseconds(seconds / clips) for seconds in times)

    rows = [
        (
            ",".join(map(str, plan.choice.mesh)), plan.choice.remat, str(plan.clips),
            gigabytes(plan.peak), "yes" if plan.fits else "no", *ms(plan.bounds, plan.clips),
        )
        for plan in plans
    ]  # fmt: skip
    header = (
        "data,fsdp,seq", "remat", "clips", "GB", "fits", "compute ms", "memory ms",
        "communication ms", "ms a clip",
    )  # fmt: skip
    return f"{table(header, rows)}\n\n{assumptions(card)}"


def answer(planner: Any, shapes: Sequence[Shape]) -> tuple[str, list[Plan]]:
    """The plan of what the config gives, and where it does not fit the nearest that does on one of
    the meshes `shapes`: (text, plans). For `planner` see search.Planner."""
    plans = [planner(planner.given())]
    parts = [plan_text(plans[0], planner.card)]
    if not plans[0].fits and shapes:
        found = nearest_fitting(plans[0], shapes, planner)
        plans += [found] if found else []
        parts.append(f"nearest: {verdict(found, planner.card) if found else 'nothing fits'}")
    return "\n\n".join(parts), plans


def sweep_answer(
    planner: Any, shapes: Sequence[Shape], policies: Sequence[str]
) -> tuple[str, list[Plan]]:
    """All plans that `sweep` makes of these meshes and remat policies, ranked: (text, plans)."""
    choices = [Choice(shape, remat) for shape in shapes for remat in policies]
    plans = ranked(sweep(choices, planner))
    if not plans:
        return "the state alone is too much for a device on each of these meshes", plans
    return sweep_text(plans, planner.card), plans


def as_json(plan: Plan, card: Card) -> dict[str, Any]:
    """Everything about one plan, for a file."""
    programs = [
        {
            key: value
            for key, value in dataclasses.asdict(measured).items()
            if key != "collectives"
        }
        | {
            "peak": measured.peak,
            "exchanges": [dataclasses.asdict(row) for row in exchanges(measured, card)],
            "bounds": dataclasses.asdict(bounds(measured, card)),
        }
        for measured in plan.programs
    ]
    return {
        "mesh": plan.choice.mesh,
        "remat": plan.choice.remat,
        "clips": plan.clips,
        "fits": plan.fits,
        "peak": plan.peak,
        "usable": card.usable,
        "seconds_per_clip": plan.seconds_per_clip,
        "programs": programs,
    }
