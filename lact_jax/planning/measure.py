"""What a compiled program takes of each device: memory, FLOPs, and what it exchanges."""

from dataclasses import dataclass

from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh

from lact_jax.flops import count_jaxpr_flops
from lact_jax.hlo import Collective, collectives
from lact_jax.ops.layer_scan import GRADIENT, KEPT
from lact_jax.planning.programs import Program, compile_for, device_bytes, trace


@dataclass(frozen=True)
class Measured:
    """A compiled program on one of its devices; bytes and FLOPs.

    Attributes:
      program: its name.
      state: what it is given, by what that is; known exactly from shapes and shardings.
      arguments: those of them that it uses, as XLA counts them.
      outputs: results that do not take the place of arguments.
      updated: what it is given and writes anew.
      gradients: of the parameters in float32, a part of `temporaries`.
      kept: what the layers keep for the backward pass, a part of `temporaries`.
      temporaries: all that it allocates while it runs.
      model_flops: of its mathematics, an even share of it.
      flops: of the matmuls that it computes, those that it repeats to save memory included.
      collectives: what devices exchange.
    """

    program: str
    state: dict[str, int]
    arguments: int
    outputs: int
    updated: int
    gradients: int
    kept: int
    temporaries: int
    model_flops: int
    flops: int
    collectives: tuple[Collective, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes that are taken while the program runs, by what it does not use of its state too."""
        return sum(self.state.values()) + self.outputs + self.temporaries

    @property
    def working(self) -> int:
        """Temporaries that are neither gradients nor kept for the backward pass: activations of the
        layer at hand, its gathered parameters, buffers of collectives. Counted as 0 where gradients
        take the place of what was kept."""
        return max(0, self.temporaries - self.gradients - self.kept)


def kept_bytes(jaxpr) -> int:
    """Bytes that the layers of a training step hand from forward to backward pass.

    Layers of `ops.layer_scan` say so by names, whether in a loop or not. Of `jax.lax.scan` they are
    the stacked results of those that run from the first layer to the last. What holds a backward
    pass as well is a loop over microbatches, or a call for one.
    """
    total = microbatch = 0
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        if equation.primitive.name == "name":
            total += _bytes(equation.outvars[0].aval) * (equation.params["name"] == KEPT)
        elif equation.primitive.name == "jit" and (kept := _named(equation, KEPT)):
            total += sum(map(_bytes, kept))  # a call of a layer's pass
        elif equation.primitive.name == "jit" and _named(equation, GRADIENT):
            continue
        elif equation.primitive.name == "jit" and _runs_backward(*inner):
            microbatch = max(microbatch, kept_bytes(*inner))
        elif equation.primitive.name != "scan":
            total += sum(map(kept_bytes, inner))
        elif kept := _named(equation, KEPT):
            total += equation.params["length"] * sum(map(_bytes, kept))
        elif _is_backward(equation):
            continue
        elif any(map(_runs_backward, inner)):
            total += sum(map(kept_bytes, inner))
        else:
            # All results but its carry, which has the shape that its body gives it.
            pairs = zip(equation.outvars, inner[0].outvars, strict=True)
            stacked = [whole.aval for whole, one in pairs if whole.aval.shape != one.aval.shape]
            total += sum(map(_bytes, stacked))
    return total + microbatch


def _bytes(aval) -> int:
    return aval.size * aval.dtype.itemsize


def _named(equation, name: str) -> list:
    """What the body of a scan, or a function that is called, calls by a name."""
    (body,) = jaxprs_in_params(equation.params)
    equations = (x for x in body.eqns if x.primitive.name == "name" and x.params["name"] == name)
    return [equation.outvars[0].aval for equation in equations]


def _is_backward(scan) -> bool:
    """Whether a scan over layers runs from the last to the first, as gradients do."""
    return scan.params["reverse"] or bool(_named(scan, GRADIENT))


def _runs_backward(jaxpr) -> bool:
    """Whether there is such a scan in it, or layers without a loop that do so."""
    return any(
        (equation.primitive.name == "scan" and _is_backward(equation))
        or (equation.primitive.name == "name" and equation.params["name"] == GRADIENT)
        or any(map(_runs_backward, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def measure(program: Program, mesh: Mesh) -> Measured:
    """Compiles a program for the devices of a mesh, which may be virtual ones."""
    traced = trace(program, mesh)
    jaxpr = traced.jaxpr.jaxpr
    compiled = compile_for(traced, mesh)
    memory = compiled.memory_analysis()
    flops = count_jaxpr_flops(jaxpr)
    asked = program.model_flops
    return Measured(
        program=program.name,
        state={name: device_bytes(tree) for name, tree in program.groups.items()},
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        updated=device_bytes(program.updated),
        gradients=device_bytes(program.gradients),
        kept=kept_bytes(jaxpr) if program.gradients else 0,
        temporaries=memory.temp_size_in_bytes,
        model_flops=flops if asked is None else asked // mesh.size,
        flops=flops,
        collectives=tuple(collectives(compiled.as_text())),
    )
