"""How fast a measured program can be at most on a card, and whether it fits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lact_jax.hlo import Collective
from lact_jax.planning.cards import GPUS_PER_NODE, Card
from lact_jax.planning.measure import Measured

# How often the bytes of a collective pass through a device, but for its own share of them: an
# all-reduce is a reduce-scatter and an all-gather (of rings; trees need no less).
PASSES = {"all-reduce": 2}
# What every device has something else for in every other: nothing is the same for a whole node.
PERSONAL = ("all-to-all", "ragged-all-to-all", "collective-permute")


@dataclass(frozen=True)
class Bounds:
    """Seconds that a program takes at least; the three may overlap."""

    compute: float
    memory: float
    communication: float

    @property
    def seconds(self) -> float:
        """Of the whole program, at least."""
        return max(self.compute, self.memory, self.communication)

    def __add__(self, other: "Bounds") -> "Bounds":
        return Bounds(
            self.compute + other.compute,
            self.memory + other.memory,
            self.communication + other.communication,
        )


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind in one place.

    Attributes:
      kind: as in hlo.KINDS.
      place: 'in the layer scan' or 'outside'.
      link: 'NVLink', or 'network' where a group is not within one node.
      devices: of a group.
      count: how many run in one call of the program.
      bytes: of all of them together, on one device.
      seconds: at least, for all of them.
    """

    kind: str
    place: str
    link: str
    devices: int
    count: int
    bytes: int
    seconds: float


def members_of_a_node(group: Sequence[int]) -> int:
    """How many devices of a group are in one node, at most."""
    return max(Counter(device // GPUS_PER_NODE for device in group).values())


def collective_seconds(collective: Collective, card: Card) -> float:
    """At least, for one of it.

    In a node every device sends and receives all but its own share over NVLink. Between nodes what
    a node needs of the others comes in once, through the adapters of all its devices that take
    part; in an all-to-all each device's part comes through its own.
    """
    devices, local = collective.devices, members_of_a_node(collective.group)
    size = PASSES.get(collective.kind, 1) * collective.bytes
    nvlink = size * (local - 1) / local / card.nvlink
    if local == devices:
        return nvlink
    outside = size * (devices - local) / devices
    adapters = 1 if collective.kind in PERSONAL else local
    return max(nvlink, outside / adapters / card.network)


def exchanges(measured: Measured, card: Card) -> list[Exchange]:
    """The program's collectives by kind, place, link and size of the group; the slowest first."""
    found: dict[tuple, list[Collective]] = {}
    for c in measured.collectives:
        place = "in the layer scan" if c.in_scan else "outside"
        link = "NVLink" if members_of_a_node(c.group) == c.devices else "network"
        found.setdefault((c.kind, place, link, c.devices), []).append(c)
    table = [
        Exchange(
            *key,
            count=sum(c.times for c in same),
            bytes=sum(c.times * c.bytes for c in same),
            seconds=sum(c.times * collective_seconds(c, card) for c in same),
        )
        for key, same in found.items()
    ]
    return sorted(table, key=lambda row: -row.seconds)


def bounds(measured: Measured, card: Card) -> Bounds:
    """The least seconds of a program.

    Compute: the matmuls that it runs. Memory: what it is given read, results written, gradients and
    what the layers keep written and read, each once. Communication: collectives one after another.
    """
    written = measured.outputs + measured.updated
    moved = measured.arguments + written + 2 * (measured.gradients + measured.kept)
    return Bounds(
        compute=measured.flops / card.flops,
        memory=moved / card.bandwidth,
        communication=sum(row.seconds for row in exchanges(measured, card)),
    )


def fits(measured: Measured, card: Card) -> bool:
    """Whether a device has the memory that the program needs at once."""
    return measured.peak <= card.usable
