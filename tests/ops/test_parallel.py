"""What a model asks about the mesh it is traced for, and the types in which parameters travel.

Programs are traced, not run: that needs no devices. tests/sharded.py runs them.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from model_fixtures import CHANNELS, FRAMES, TEXT_DIM, tiny

from lact_jax.models.dit import abstract_params, bind
from lact_jax.ops import parallel
from lact_jax.ops.sequence import SequenceLayout


def traced_for(*shape):
    mesh = AbstractMesh(shape, parallel.AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.sharding.use_abstract_mesh(mesh)


def test_without_a_mesh_nothing_is_exchanged():
    x = jnp.arange(24, dtype=jnp.float32).reshape(1, 4, 2, 3)
    assert parallel.mesh_shape() is None and parallel.seq_size() == 1
    assert parallel.sum_over_tokens(x) is x and parallel.mean_over_devices(x) is x
    assert parallel.own_tokens(x, 1) is x and parallel.all_tokens(x, 1) is x
    assert parallel.head_axis(4) is None
    o, kept = parallel.attend_to_whole_chunks(lambda q, k, v: (q, (k, v)), x, x, x)
    assert o is x and kept == (x, x)


@pytest.mark.parametrize(
    ("shape", "batch", "axes"),
    [
        ((2, 4, 1), 8, ("data", "fsdp")),
        ((2, 4, 1), 2, ("data",)),
        ((2, 4, 1), 4, ("data",)),
        ((3, 4, 1), 4, ("fsdp",)),
        ((2, 4, 1), 1, ()),
        ((1, 1, 8), 1, ("data", "fsdp")),
    ],
)
def test_a_batch_is_cut_over_what_divides_it(shape, batch, axes):
    with traced_for(*shape):
        assert parallel.batch_axes(batch) == axes


def test_heads_are_cut_where_they_divide():
    with traced_for(1, 2, 4):
        assert parallel.head_axis(12) == "seq" and parallel.head_axis(6) is None


def test_tokens_that_devices_can_not_share_are_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"a chunk has 12 tokens, which the 8 devices of mesh.seq"):
        parallel.check_tokens(12, 8)


def equations(jaxpr, in_scan=False):
    """(equation, whether it stands in a scan) of a jaxpr and all it calls."""
    for equation in jaxpr.eqns:
        yield equation, in_scan
        inside = in_scan or equation.primitive.name == "scan"
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner, inside)


def test_parameters_travel_in_the_type_of_their_matmul_and_gradients_are_summed_in_float32():
    config = tiny(dtype="bfloat16", remat="full")
    layout = SequenceLayout(3)

    def loss(params, x, t, text):
        frames = jnp.zeros((layout.length, FRAMES), jnp.int32)
        velocity, _ = bind(config, params).sequence(x, t, text, frames, layout)
        return jnp.sum(velocity)

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    inputs = (
        shape(2, layout.length, FRAMES, 4, 4, CHANNELS), shape(2, layout.length),
        shape(2, 4, TEXT_DIM),
    )  # fmt: skip
    with traced_for(1, 2, 4):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(abstract_params(config), *inputs)
    found = Counter()
    for equation, in_scan in equations(jaxpr.jaxpr):
        kind, out = equation.primitive.name, equation.outvars[0].aval if equation.outvars else None
        if kind in ("all_gather", "reduce_scatter") and out.ndim in (2, 3):
            found[kind, str(out.dtype), in_scan] += 1
    # Of a layer: eight projections and two of the MLP; the fast weights are used in float32. Each
    # is gathered for the forward pass and again for the backward pass.
    assert found["all_gather", "bfloat16", True] == 2 * 10
    assert found["all_gather", "float32", True] == 2 * 3
    assert found["reduce_scatter", "float32", True] == 13
    # Text embedding; time embedding and projection. Three axes: the tokens' velocity is not here.
    assert found["all_gather", "bfloat16", False] == 2
    assert found["all_gather", "float32", False] == 3
    assert found["reduce_scatter", "float32", False] == 5
    assert not any(dtype == "bfloat16" for kind, dtype, _ in found if kind == "reduce_scatter")

