"""Where the time of a training step goes: kernels of one profiled step by part and by kind.

    python -m benchmarks.profile_step --config=configs/ar_chunk3f.py

Parts are the named scopes of the model, each in the forward pass, in what is computed again, and in
the backward pass. Kinds: matrix products, attention, and everything else, which is bound by memory.
"""

import collections
import gzip
import json
import re
import tempfile
from pathlib import Path

import jax
from absl import app, flags

from benchmarks import common, train_step

TOP = flags.DEFINE_integer("top", 40, "Kernels to list.")

PARTS = ("window_attention", "fast_weights", "self_attention", "cross_attention", "ffn")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\S+).*?op_name=\"([^\"]*)\"", re.M)
_MODULE = re.compile(r"^HloModule ([\w.\-]+)", re.M)


def sources(compiled_text: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(module, instruction) -> (type of its result, name stack of the JAX operation behind it)."""
    _, *parts = _MODULE.split(compiled_text)
    return {
        (module, name): (kind, stack)
        for module, text in zip(parts[::2], parts[1::2], strict=True)
        for name, kind, stack in _INSTRUCTION.findall(text)
    }


def kernel_times(folder: Path) -> dict[tuple[str, str, str], tuple[float, int]]:
    """(module, instruction, kernel) -> (milliseconds, launches) of all device streams."""
    (path,) = folder.rglob("*.trace.json.gz")
    found = collections.defaultdict(lambda: [0.0, 0])
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        instruction = event.get("args", {}).get("hlo_op")
        if instruction is not None and "dur" in event:
            module = event["args"].get("hlo_module", "").split("(")[0]
            entry = found[module, instruction, event["name"]]
            entry[0] += event["dur"] / 1e3
            entry[1] += 1
    return {key: tuple(value) for key, value in found.items()}


def part_of(stack: str) -> str:
    """The model's part that a name stack lies in, and its pass; 'unknown' without a stack."""
    if not stack:
        return "unknown"
    part = next((p for p in PARTS if f"/{p}/" in f"{stack}/"), "outside of the parts")
    again = "again" if "rematted" in stack else "backward" if "transpose(" in stack else "forward"
    return f"{part}, {again}"


def kind_of(instruction: str, kernel: str) -> str:
    """'matmul', 'attention' or 'other', from the names of an instruction and its kernel."""
    name = f"{instruction} {kernel}".lower()
    if any(word in name for word in ("fmha", "sdpa", "cudnn_generated", "flash")):
        return "attention"
    gemm = ("gemm", "cublas", "nvjet", "cutlass", "dot")
    return "matmul" if any(word in name for word in gemm) else "other"


def main(_):
    step = train_step.Step()
    # A profile does not tell the instructions within a CUDA graph.
    graphs = {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else None
    stacks = sources(step.compile(graphs).as_text())
    for _ in range(2):
        jax.block_until_ready(step.advance())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(step.advance())
        times = kernel_times(Path(folder))
    by_part, rows = collections.Counter(), []
    for (module, instruction, kernel), (ms, launches) in times.items():
        kind, stack = stacks.get((module, instruction), ("", ""))
        by_part[part_of(stack), kind_of(instruction, kernel)] += ms
        rows.append((ms, launches, instruction, kernel[:40], kind[:60], stack[-90:]))
    for ms, launches, *names in sorted(rows, reverse=True)[: TOP.value]:
        print(f"{ms:8.1f} ms x{launches:5} " + "  ".join(names))
    table = {f"{part}, {kind}": ms for (part, kind), ms in by_part.most_common()}
    by_kind = collections.Counter()
    for (_, kind), ms in by_part.items():
        by_kind[f"all parts, {kind}"] += ms
    total = {**by_kind, "kernels ms": sum(by_part.values()), "peak GB": common.peak_gigabytes()}
    common.report("profile_step", table | total, train_step.JSON.value)


if __name__ == "__main__":
    app.run(main)
