"""Counts the multiplications of a function from its jaxpr, before any compiler touches it."""

import math

import jax
from jax.extend.core import jaxprs_in_params


def _convolution(equation) -> int:
    kernel = equation.invars[1].aval.shape
    out_axis = equation.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[out_axis]


def _dot(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    summed = math.prod(left[axis] for axis in contracted)
    return 2 * math.prod(equation.outvars[0].aval.shape) * summed


COUNTED = {"conv_general_dilated": _convolution, "dot_general": _dot}


def _count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in COUNTED:
            total += COUNTED[name](equation)
        repeats = equation.params["length"] if name == "scan" else 1
        total += repeats * sum(_count(inner) for inner in jaxprs_in_params(equation.params))
    return total


def count_flops(function, *args) -> int:
    """FLOPs of the convolutions and matmuls in `function(*args)`, two for each multiply-add.

    Arguments may be `jax.ShapeDtypeStruct`s; nothing is computed. A scan counts each of its steps;
    a while loop, whose number is not known, counts one.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)
