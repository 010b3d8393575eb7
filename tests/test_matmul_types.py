"""Which types a bfloat16 training step multiplies: every matmul of its program, both passes.

A float32 matmul costs many times a bfloat16 one, and one float32 operand is enough to make it so.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from model_fixtures import CARD, equations

from lact_jax.config import Config, TrainConfig
from lact_jax.models.dit import DiTConfig
from lact_jax.models.lact import LaCTConfig
from lact_jax.planning.virtual import building_for
from lact_jax.train_state import init_state, make_train_step

# No size but those of tokens is a multiple of S or L.
CHUNKS, S, L, DIM, E, H = 5, 3 * 5 * 6, 22, 32, 16, 24
LATENT_HW = 10, 12

# Float32 matmuls that are meant: the shapes of both operands say which they are.
EXCEPTIONS = {
    # (B, C, width) times a matrix, and back: its rounding would reach every layer's modulation.
    "time embedding": lambda a, b: CHUNKS in a or CHUNKS in b,
    # Newton-Schulz of updates, (E, H) each: the iteration squares its errors.
    "Muon": lambda a, b: {*a[-2:], *b[-2:]} <= {E, H},
}
ALLOWED = {
    "lact": {"time embedding", "Muon"},
    "window": {"time embedding"},
    "gla": {"time embedding"},
}


@functools.cache
def step_matmuls(mixer: str, dtype: str) -> list:
    """(shapes, types) of the operands of every matmul of a step, as a GPU is to run it."""
    lact = LaCTConfig(fw_head_dim=E, inter_multi=H / E, muon=True, momentum=True)
    model = DiTConfig(
        dim=DIM, ffn_dim=72, num_heads=2, num_layers=2, freq_dim=8, text_dim=14, text_len=L,
        latent_channels=4, mixer=mixer, lact=(lact,), remat="selective", dtype=dtype,
    )  # fmt: skip
    config = Config(model=model, train=TrainConfig(trainable="all"))
    state = jax.eval_shape(lambda: init_state(config))
    latent = jax.ShapeDtypeStruct((1, 9, *LATENT_HW, 4), jnp.float32)
    text = jax.ShapeDtypeStruct((1, L, model.text_dim), jnp.float32)
    empty = jax.ShapeDtypeStruct(text.shape[1:], jnp.float32)
    with building_for(CARD):
        program = jax.make_jaxpr(make_train_step(config))(state, latent, text, empty)
    operands = [[v.aval for v in e.invars[:2]] for e in equations(program.jaxpr, "dot_general")]
    return [([x.shape for x in pair], [x.dtype for x in pair]) for pair in operands]


def has_tokens(shapes) -> bool:
    return any(size and size % n == 0 for shape in shapes for size in shape for n in (S, L))


def in_float32(mixer: str, dtype: str) -> list:
    """Shapes of the operands of every matmul with a float32 operand."""
    found = step_matmuls(mixer, dtype)
    return [shapes for shapes, types in found if jnp.float32 in types]


@pytest.mark.parametrize("mixer", ALLOWED)
def test_a_step_multiplies_tokens_in_bfloat16_alone(mixer):
    assert sum(has_tokens(shapes) for shapes, _ in step_matmuls(mixer, "bfloat16")) > 40
    found = in_float32(mixer, "bfloat16")
    assert [shapes for shapes in found if has_tokens(shapes)] == []
    names = [{n for n, fits in EXCEPTIONS.items() if fits(*shapes)} for shapes in found]
    assert set().union(*names) == ALLOWED[mixer]
    assert [shapes for shapes, name in zip(found, names, strict=True) if not name] == []


def test_a_float32_model_would_be_found():
    assert sum(map(has_tokens, in_float32("lact", "float32"))) > 40
