"""The Wan VAE: golden case, streaming, causality, types, sizes and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from vae_fixtures import (
    TINY,
    bind,
    golden_params,
    random_array,
    read_golden,
    relative_error,
    shifted_params,
    stream,
)

from lact_jax.models.vae import VAEConfig, over_chunks
from lact_jax.models.vae_codec import abstract_vae
from lact_jax.vae_weights import TRANSFORMS, rows

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def tiny():
    """Encode and decode steps of the small random VAE."""
    return bind(shifted_params(), TINY)


def test_golden_latent_and_reconstruction():
    config, tensors = read_golden()
    names = {name.removeprefix("param.") for name in tensors if name.startswith("param.")}
    assert {row.wan for row in rows(config)} == names
    encode, decode = bind(golden_params(config, tensors), config)
    names = ("in.video", "out.latent", "out.video")
    video, want_latent, want_video = (np.moveaxis(tensors[name], 1, -1) for name in names)
    assert relative_error(encode(None, video)[1], want_latent) < 1e-5
    reconstruction = decode(None, want_latent)[1]
    assert relative_error(reconstruction, want_video) < 1e-5
    assert np.abs(reconstruction).max() > 1  # the golden video leaves [-1, 1]: it is not clamped


@pytest.mark.parametrize("sizes", [(1, 4, 8), (5, 8), (1, 4, 4, 4)])
def test_encoding_in_pieces_equals_the_whole(tiny, sizes):
    video = random_array(10 + len(sizes), 2, 13, 16, 24, 3)
    whole = stream(tiny[0], video, (13,))
    assert whole.shape == (2, 4, 2, 3, 16)
    assert relative_error(stream(tiny[0], video, sizes), whole) < 1e-6


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (3, 1)])
def test_decoding_in_pieces_equals_the_whole(tiny, sizes):
    latent = random_array(20 + len(sizes), 2, 4, 2, 3, 16)
    whole = stream(tiny[1], latent, (4,))
    assert whole.shape == (2, 13, 16, 24, 3)
    assert relative_error(stream(tiny[1], latent, sizes), whole) < 1e-6


@pytest.mark.parametrize("latents_per_call", [1, 2, 9])
def test_scan_over_a_clip_equals_the_whole(tiny, latents_per_call):
    latent = random_array(30 + latents_per_call, 2, 4, 2, 3, 16)
    whole = stream(tiny[1], latent, (4,))
    scanned = over_chunks(tiny[1], latent, latents_per_call, stride=1)
    assert relative_error(scanned, whole) < 1e-6
    video = random_array(40 + latents_per_call, 2, 13, 16, 24, 3)
    whole = stream(tiny[0], video, (13,))
    assert relative_error(over_chunks(tiny[0], video, latents_per_call, stride=4), whole) < 1e-6


def test_a_carry_keeps_its_shapes(tiny):
    latent = random_array(50, 1, 1, 2, 2, 16)
    first = jax.eval_shape(tiny[1], None, latent)[0]
    later = jax.eval_shape(tiny[1], first, latent)[0]
    assert later == first
    assert len(jax.tree.leaves(first)) == 24  # 22 causal convolutions, 2 time-upsamplings


def test_no_frame_sees_a_later_one(tiny):
    video = random_array(60, 2, 13, 16, 24, 3)
    latent = stream(tiny[0], video, (13,))
    changed = stream(tiny[0], video.at[:, 5:].add(1.0), (13,))
    np.testing.assert_array_equal(changed[:, :2], latent[:, :2])
    assert relative_error(changed[:, 2:], latent[:, 2:]) > 1e-3
    decoded = stream(tiny[1], latent, (4,))
    changed = stream(tiny[1], latent.at[:, 2:].add(1.0), (4,))
    np.testing.assert_array_equal(changed[:, :5], decoded[:, :5])
    assert relative_error(changed[:, 5:], decoded[:, 5:]) > 1e-3


def equations(jaxpr):
    """Every equation of a jaxpr, those of nested ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_bfloat16_runs_no_float32_convolution_or_matmul(tiny):
    encode, decode = bind(shifted_params(), dataclasses.replace(TINY, dtype="bfloat16"))
    video, latent = random_array(65, 2, 13, 16, 24, 3), random_array(66, 2, 4, 2, 3, 16)
    carry = jax.eval_shape(decode, None, latent)[0]
    programs = [
        jax.make_jaxpr(encode)(None, video),
        jax.make_jaxpr(decode)(None, latent),
        jax.make_jaxpr(decode)(carry, latent),
    ]
    operands = [
        {str(operand.aval.dtype) for operand in equation.invars}
        for program in programs
        for equation in equations(program.jaxpr)
        if equation.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    assert len(operands) > 60
    assert all(types == {"bfloat16"} for types in operands)
    assert relative_error(encode(None, video)[1], tiny[0](None, video)[1]) < 3e-2
    assert relative_error(decode(None, latent)[1], tiny[1](None, latent)[1]) < 3e-2


def test_full_size_parameter_count():
    leaves = jax.tree.leaves(abstract_vae(VAEConfig())[1])
    assert sum(leaf.size for leaf in leaves) == 126_892_531
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float16"}, "dtype='float16': choose"),
        ({"temporal_downsample": (True, True, True)}, "give three, two of them true"),
        ({"dim_mult": (1, 2, 4)}, "give one multiplier for each of 4 levels"),
        ({"z_dim": 4}, "z_dim=4 but 16 latent_mean and 16 latent_std"),
    ],
)
def test_config_errors_say_what_to_change(options, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**options)


def test_a_clip_in_calls_of_nothing_is_refused(tiny):
    with pytest.raises(ValueError, match="latents_per_call=0: must be at least 1"):
        over_chunks(tiny[1], random_array(90, 1, 2, 2, 2, 16), 0, stride=1)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("point3d", np.zeros((4, 2, 3, 1, 1)), r"shape \(4, 2, 3, 1, 1\): need 5 axes, of size 1"),
        ("conv2d", np.zeros((4, 2)), r"shape \(4, 2\): need 4 axes"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(name, tensor, message):
    with pytest.raises(ValueError, match=message):
        TRANSFORMS[name].to_jax(tensor)
