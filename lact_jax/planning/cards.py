"""The cards that can be planned for, and how fast they are at most.

Rates are those of NVIDIA's data sheets: dense bfloat16, one direction of NVLink, and the network
adapter that the DGX of that card has for each of its eight GPUs.
"""

import difflib
import importlib.resources
from dataclasses import dataclass

GPUS_PER_NODE = 8
# What JAX is to be given of the card (XLA_PYTHON_CLIENT_MEM_FRACTION): the driver, NCCL's buffers
# and loaded kernels need the rest.
USABLE = 0.95


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
      name: the key in CARDS and in the name of its target file.
      memory: bytes, as nvidia-smi shows them.
      flops: dense bfloat16 FLOP/s.
      bandwidth: bytes/s of its memory.
      nvlink: bytes/s to the other GPUs of its node, in one direction.
      network: bytes/s to other nodes, in one direction.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    nvlink: float
    network: float

    @property
    def usable(self) -> int:
        """Bytes that a program may take."""
        return int(USABLE * self.memory)

    @property
    def target(self) -> str:
        """XLA's description of the card (a GpuTargetConfigProto in text form)."""
        assets = importlib.resources.files("lact_jax") / "assets"
        return (assets / f"gpu_{self.name}.txtpb").read_text()


def _card(name: str, mebibytes: int, *rates: float) -> Card:
    return Card(name, mebibytes * 2**20, *rates)


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("h200", 143771, 989e12, 4.8e12, 450e9, 50e9),
        _card("h100", 81559, 989e12, 3.35e12, 450e9, 50e9),
        _card("a100", 81920, 312e12, 2.04e12, 300e9, 25e9),
    )
}


def find_card(name: str) -> Card:
    """The card of that name; ValueError names the known ones."""
    if name not in CARDS:
        near = difflib.get_close_matches(name.lower(), CARDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--gpu={name}: {hint}known cards are {', '.join(sorted(CARDS))}")
    return CARDS[name]
