"""Reads compiled programs: which collectives a device runs, how large, how often, in which loop.

A compiled program is XLA's text, `jax.jit(f).lower(...).compile().as_text()`: computations made of
instructions, of which `while` names its body, the number of turns it takes where XLA knows it, and
other instructions the computations they call.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?"
                     r"([\w.\-]+)")  # fmt: skip
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_IOTA_GROUPS = re.compile(
    r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")


@dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of KINDS.
      bytes: of the larger side on one device: what it gathers, sums, scatters or exchanges.
      dtype: XLA's name, 'f32' or 'bf16' for example; of the largest operand.
      computation: the XLA computation it stands in.
      in_scan: whether that runs inside a loop (a `lax.scan` over layers or chunks).
      times: how often it runs; loops whose number of turns XLA does not know count once.
      devices: how many take part together.
      group: the places in the mesh, counted along its last axis first, of the first such devices.
      source: the name stack of the JAX operation it comes from; '' where XLA kept none.
    """

    kind: str
    bytes: int
    dtype: str
    computation: str
    in_scan: bool
    times: int
    devices: int
    group: tuple[int, ...]
    source: str


def _arrays(hlo_type: str) -> list[tuple[int, str]]:
    """(bytes, dtype) of every array in a type such as 'f32[2,3]{1,0}' or a tuple of them."""
    found = []
    for dtype, sizes in _ARRAY.findall(hlo_type):
        bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or ["0"])[0])
        count = math.prod(int(n) for n in sizes.split(",") if n)
        found.append(((bits * count + 7) // 8, dtype))
    return found


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _mesh_group(sizes: str, names: str) -> np.ndarray:
    """The first group over some axes of a mesh: sizes "'a'=2,'b'=4", names "'b'". Of an axis that
    is split, 'b':(2)2 are the 2 after the first 2."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    ids = np.arange(math.prod(axes.values())).reshape(*axes.values())
    named = {name: part for name, *part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", names)}
    for dim, (name, size) in enumerate(axes.items()):
        before, own = (int(n or 1) for n in named.get(name, ("", "")))
        if name in named and not named[name][1]:
            own = size
        step = size // before // own
        ids = ids.take(range(0, own * step, step), axis=dim)
    return ids.ravel()


def _first_group(line: str, partitions: int) -> tuple[int, ...]:
    """Devices of the first replica group, in each of the three ways in which XLA writes groups."""
    if found := _MESH_GROUPS.search(line):
        return tuple(_mesh_group(found[1], found[2]).tolist())
    if found := _IOTA_GROUPS.search(line):
        ids = np.arange(int(found[1]) * int(found[2])).reshape(_numbers(found[3]))
        ids = ids.transpose(_numbers(found[4])) if found[4] else ids
        return tuple(ids.ravel()[: int(found[2])].tolist())
    if found := _LISTED_GROUPS.search(line):
        return tuple(_numbers(found[1]))
    return tuple(range(partitions))


class _Program:
    """The instructions of a compiled program by computation, and who calls whom."""

    def __init__(self, text: str):
        found = _PARTITIONS.search(text.partition("\n")[0])
        self.partitions = int(found[1]) if found else 1
        self.lines: dict[str, list[re.Match]] = {}
        self.entry = name = ""
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                name = found[2]
                self.lines[name] = []
                self.entry = name if found[1] else self.entry
            elif name and (found := _INSTRUCTION.match(line)):
                self.lines[name].append(found)
        if not self.entry:
            raise ValueError("not the text of a compiled XLA program: it has no ENTRY computation")
        self.callers: dict[str, list[tuple[str, bool, int]]] = {name: [] for name in self.lines}
        self._runs = {self.entry: (False, 1)}
        for name, lines in self.lines.items():
            for found in lines:
                self._note_calls(name, found[0])

    def _note_calls(self, caller: str, line: str) -> None:
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip(" %") for branch in branches.split(",")]
        body, trips = _BODY.search(line), _TRIPS.search(line)
        for name in called:
            turns = int(trips[1]) if body and trips else 1
            if name in self.callers:
                self.callers[name].append((caller, body is not None, turns))

    def runs(self, computation: str) -> tuple[bool, int]:
        """(whether it runs inside a loop, how often it runs)."""
        if computation not in self._runs:
            in_loop, times = False, 0
            for caller, is_loop, turns in self.callers[computation]:
                caller_in_loop, caller_times = self.runs(caller)
                in_loop = in_loop or is_loop or caller_in_loop
                times += turns * caller_times
            self._runs[computation] = in_loop, times
        return self._runs[computation]


def _operand_bytes(found: re.Match, types: dict[str, str]) -> list[tuple[int, str]]:
    """(bytes, dtype) of every operand of an instruction."""
    operands = found[4].partition(")")[0]
    names = re.findall(r"%([\w.\-]+)", operands)
    return [array for name in names for array in _arrays(types.get(name, ""))]


def collectives(compiled_text: str) -> list[Collective]:
    """Every collective of a compiled program, in the order of its text.

    Those of one device alone, which exchange nothing, are left out.

    Args:
      compiled_text: `jax.jit(f).lower(...).compile().as_text()`, for any backend.

    Raises:
      ValueError: the text is not a compiled program.
    """
    program = _Program(compiled_text)
    found = []
    for name, lines in program.lines.items():
        types = {line[1]: line[2] for line in lines}
        for line in lines:
            kind = line[3].removesuffix("-start")
            if kind not in KINDS:
                continue
            group = _first_group(line[0], program.partitions)
            devices = len(group)
            if devices == 1:
                continue
            operands = _operand_bytes(line, types)
            size = sum(n for n, _ in operands) * (devices if kind == "all-gather" else 1)
            source = _SOURCE.search(line[0])
            in_scan, times = program.runs(name)
            found.append(
                Collective(
                    kind, size, max(operands)[1], name, in_scan, times, devices,
                    group, source[1] if source else "",
                )  # fmt: skip
            )
    return found


def count(found: list[Collective]) -> Counter:
    """How many collectives there are of each (kind, in_scan)."""
    return Counter((c.kind, c.in_scan) for c in found)
