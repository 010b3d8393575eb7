"""Plans of a config on a number of cards, and the search for one that fits or is fastest."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import jax

from lact_jax.config import Config
from lact_jax.planning.bounds import Bounds, bounds, fits
from lact_jax.planning.cards import Card
from lact_jax.planning.measure import Measured, measure
from lact_jax.planning.programs import (
    JOBS,
    abstract_state,
    device_bytes,
    plan_mesh,
    with_whole_batch,
)
from lact_jax.sharding import MeshConfig

# From the policy that keeps most for the backward pass to the one that repeats most.
FRUGALITY = ("none", "all_dots", "dots", "selective", "attention", "full")
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Choice:
    """What is searched over: the mesh (data, fsdp, seq) and the remat policy."""

    mesh: Shape
    remat: str

    def __str__(self) -> str:
        return f"mesh {','.join(map(str, self.mesh))}, remat {self.remat!r}"


@dataclass(frozen=True)
class Plan:
    """A choice, measured; `clips` (or prompts) are done by one call of its programs."""

    choice: Choice
    clips: int
    programs: tuple[Measured, ...]
    bounds: Bounds
    fits: bool

    @property
    def peak(self) -> int:
        """Bytes of the program that needs most."""
        return max(program.peak for program in self.programs)

    @property
    def seconds_per_clip(self) -> float:
        return self.bounds.seconds / self.clips


@dataclass(frozen=True)
class Planner:
    """Makes plans: compiles the programs of a job for `devices`, which are of kind `card`."""

    config: Config
    job: str
    card: Card
    devices: Sequence[jax.Device]
    log: Callable[[str], None] = lambda text: None

    def config_of(self, choice: Choice) -> Config:
        """The config with this choice, before its batch is made whole."""
        model = dataclasses.replace(self.config.model, remat=choice.remat)
        return dataclasses.replace(self.config, model=model, mesh=MeshConfig(*choice.mesh))

    def given(self) -> Choice:
        """The choice that the config makes; ValueError where its mesh does not fit."""
        shape = plan_mesh(self.config, self.devices).shape
        return Choice((shape["data"], shape["fsdp"], shape["seq"]), self.config.model.remat)

    def state_bytes(self, choice: Choice) -> int:
        """What a device holds before it computes anything: known without compiling."""
        config = self.config_of(choice)
        state, _ = abstract_state(config, plan_mesh(config, self.devices))
        return device_bytes(state if self.job == "train" else (state.params, state.frozen))

    def hopeless(self, choice: Choice) -> bool:
        """Whether the state alone is too much."""
        return self.state_bytes(choice) > self.card.usable

    def __call__(self, choice: Choice) -> Plan:
        """Compiles and measures."""
        config = self.config_of(choice)
        mesh = plan_mesh(config, self.devices)
        config = with_whole_batch(config, mesh)
        self.log(f"compiling for {choice}")
        measured = tuple(measure(program, mesh) for program in JOBS[self.job](config, mesh))
        clips = config.data.batch_size if self.job == "train" else config.sample.batch_size
        limits = [bounds(program, self.card) for program in measured]
        fitting = all(fits(program, self.card) for program in measured)
        return Plan(choice, clips, measured, reduce(add, limits), fitting)


def parse_mesh(text: str) -> Shape:
    """'1,8,1' as (1, 8, 1); ValueError for anything but three whole numbers."""
    parts = text.split(",")
    try:
        data, fsdp, seq = (int(part) for part in parts)
    except ValueError:
        raise ValueError(f"--mesh={text}: give data,fsdp,seq, for example 1,8,1") from None
    return data, fsdp, seq


def meshes(gpus: int, tokens: int) -> list[Shape]:
    """Every (data, fsdp, seq) of so many GPUs in which seq divides the tokens of a chunk."""
    return [
        (data, rest // seq, seq)
        for data in range(1, gpus + 1)
        if gpus % data == 0
        for rest in (gpus // data,)
        for seq in range(1, rest + 1)
        if rest % seq == 0 and tokens % seq == 0
    ]


def distance(a: Shape, b: Shape) -> float:
    """How many halvings and doublings of axes lie between two meshes."""
    return sum(abs(math.log2(x / y)) for x, y in zip(a, b, strict=True))


def nearest_fitting(plan: Plan, shapes: Iterable[Shape], planner: Any) -> Plan | None:
    """The nearest choice to one that does not fit, that does: None where there is none.

    Nearest is another remat policy on the same mesh, then another mesh. On each mesh the most
    frugal policy is compiled first: where that does not fit, no other does.

    Args:
      plan: of the choice that does not fit.
      shapes: the meshes to try.
      planner: see Planner; called with a Choice it gives a Plan.
    """
    asked = plan.choice
    after = FRUGALITY[FRUGALITY.index(asked.remat) + 1 :]
    for shape in sorted(shapes, key=lambda shape: distance(shape, asked.mesh)):
        policies = after if shape == asked.mesh else (asked.remat, *after)
        last = Choice(shape, FRUGALITY[-1])
        if not policies or planner.hopeless(last):
            continue
        frugal = planner(last)
        if frugal.fits:
            others = (planner(Choice(shape, remat)) for remat in policies[:-1])
            return next((found for found in others if found.fits), frugal)
    return None


def sweep(choices: Iterable[Choice], planner: Any) -> Iterator[Plan]:
    """Plans of all choices that are worth compiling, as they are made.

    On each mesh policies are tried from the one that repeats least; once one fits, those after it
    only take longer. Meshes that the state alone fills are left out.
    """
    by_mesh: dict[Shape, list[Choice]] = {}
    for choice in choices:
        by_mesh.setdefault(choice.mesh, []).append(choice)
    for same in by_mesh.values():
        for choice in sorted(same, key=lambda choice: FRUGALITY.index(choice.remat)):
            if planner.hopeless(choice):
                break
            plan = planner(choice)
            yield plan
            if plan.fits:
                break


def ranked(plans: Iterable[Plan]) -> list[Plan]:
    """Those that fit by their least seconds a clip (ties: by the sum of the three bounds), then
    the others by their memory."""

    def key(plan: Plan):
        limits = plan.bounds
        total = (limits.compute + limits.memory + limits.communication) / plan.clips
        return (not plan.fits, *((plan.seconds_per_clip, total) if plan.fits else (plan.peak,)))

    return sorted(plans, key=key)
