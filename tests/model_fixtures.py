"""Tiny models with random parameters, and their compiled functions, shared by the tests.

Letters: B batch, R noise repeats, W chunks of the video, F latent frames of a chunk, h, w latent
size, c channels, L text tokens, Q text width.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from lact_jax.models.dit import DiTConfig, abstract_params, bind
from lact_jax.models.gla import GLAConfig
from lact_jax.models.lact import LaCTConfig
from lact_jax.ops.sequence import SequenceLayout, frame_positions, pack, unpack_noise

FRAMES, HEIGHT, WIDTH, CHANNELS = 2, 4, 6, 3  # of a chunk of latents: 12 tokens
TOKENS = FRAMES * HEIGHT * WIDTH // 4
NUM_CHUNKS = 3
TEXT_LEN, TEXT_DIM = 5, 7
HEAD_DIM = 12

# Every option of the LaCT layer away from its default, one (or a pair) at a time.
LACT_OPTIONS = {
    "default": {},
    "momentum": {"momentum": True},
    "muon": {"muon": True, "muon_iters": 3},
    "momentum and muon": {"momentum": True, "muon": True},
    "no weight norm": {"weight_norm": False},
    "silu": {"qkv_silu": True},
    "silu then norm": {"qkv_silu": True, "l2_norm_after_silu": True},
    "no l2": {"qk_l2_norm": False},
    "no o_norm": {"o_norm": False},
    "constant gate": {"learnable_ttt_scale": False, "ttt_scale": 0.7},
    "fast heads as narrow as attention heads": {"fw_head_dim": HEAD_DIM},
    "inter_multi 1": {"inter_multi": 1},
    "inter_multi 3": {"inter_multi": 3},
    "identity": {"w_init": "identity"},
    "window 0": {"kv_cache_size": 0},
    "window 5": {"kv_cache_size": 5},
}


def lact(**options) -> LaCTConfig:
    return LaCTConfig(**{"fw_head_dim": 2 * HEAD_DIM, **options})


def tiny(*lact_options: dict, **changes) -> DiTConfig:
    """A DiT of two layers in float32; one dict of LaCT options for each set to cycle over."""
    sizes = dict(
        dim=48, ffn_dim=40, num_heads=4, num_layers=2, freq_dim=16, text_dim=TEXT_DIM,
        text_len=TEXT_LEN, latent_channels=CHANNELS, dtype="float32", remat="none",
    )  # fmt: skip
    sets = tuple(lact(**options) for options in lact_options or ({},))
    return DiTConfig(**{**sizes, "lact": sets, **changes})


# What JAX says of a card.
CARD = SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H200", core_count=132, compute_capability="9.0"
)
# The smallest sizes that the Triton kernels take.
FITS_KERNELS = tiny(
    {"fw_head_dim": 128}, dim=256, ffn_dim=256, num_heads=8, kernels="interpret", remat="selective"
)
MODELS = {name: tiny(options) for name, options in LACT_OPTIONS.items()} | {
    "two sets cycled": tiny({"momentum": True}, {"kv_cache_size": 5, "qkv_silu": True}),
    "position embedding": tiny(position_embedding=True),
    "mixed": tiny({}, attn_every_n_layers=2),
    "full attention": tiny(mixer="full"),
    "window alone": tiny({"kv_cache_size": 5}, mixer="window"),
    "gated linear": tiny(mixer="gla"),
    "gated linear in two heads": tiny({"kv_cache_size": 5}, mixer="gla", gla=GLAConfig(24)),
}


def _random_leaf(rng, name: str, shape) -> np.ndarray:
    noise = rng.standard_normal(shape)
    spread_and_centre = {
        "scale": (0.2, 1.0),
        "qk_scale": (0.2, 1.0),
        "qk_offset": (0.3, 0.0),
        "bias": (0.3, 0.0),
        "modulation": (0.4, 0.0),
    }
    if name in spread_and_centre:
        spread, centre = spread_and_centre[name]
        return spread * noise + centre
    fan_in = shape[-1] if name in ("w0", "w1", "w2") else shape[-2]
    return noise / np.sqrt(fan_in)


def randomise(shapes: dict, rng, path: tuple[str, ...] = ()) -> dict:
    """Random values for a nested dict of shapes, none of them at the special value it starts at.

    Zeros would hide what they multiply. Learning rates are raised, so that few tokens write much.
    """
    values = {}
    for name, leaf in sorted(shapes.items()):
        if isinstance(leaf, dict):
            values[name] = randomise(leaf, rng, (*path, name))
            continue
        value = _random_leaf(rng, name, leaf.shape)
        if name == "bias" and path[-1] in ("lr_proj", "ttt_scale_proj"):
            value = value + (4 if path[-1] == "lr_proj" else 1)
        values[name] = value.astype(np.float32)
    return values


def identity_fast_weights(params: dict) -> dict:
    """The same parameters with identity matrices for w0, w1, w2, wherever they are."""
    eyes = ("w0", "w1", "w2")
    return {
        name: identity_fast_weights(leaf)
        if isinstance(leaf, dict)
        else np.broadcast_to(np.eye(*leaf.shape[-2:], dtype=np.float32), leaf.shape)
        if name in eyes
        else leaf
        for name, leaf in params.items()
    }


@functools.cache
def random_params(config: DiTConfig, seed: int = 0) -> dict:
    params = randomise(abstract_params(config), np.random.default_rng(seed))
    identity = config.mixer == "lact" and config.lact[0].w_init == "identity"
    return identity_fast_weights(params) if identity else params


def random_inputs(batch: int, repeats: int, seed: int = 0, chunks: int = NUM_CHUNKS):
    """clean (B, W, F, h, w, c), noise (B, R, W, ...), timesteps (B, R, W), text (B, L-1, Q)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    chunk = (FRAMES, HEIGHT, WIDTH, CHANNELS)
    return SimpleNamespace(
        clean=normal(batch, chunks, *chunk),
        noise=normal(batch, repeats, chunks, *chunk),
        timestep=jnp.asarray(rng.uniform(0, 1000, (batch, repeats, chunks)), jnp.float32),
        text=normal(batch, TEXT_LEN - 1, TEXT_DIM),
    )


@functools.cache
def compiled(config: DiTConfig) -> SimpleNamespace:
    """The model's functions as jitted functions of the parameters."""

    def sequence(params, clean, noise, timestep, text):
        """Predictions for the noise copies (B, R, W, ...), and the statistics."""
        layout = SequenceLayout(num_chunks=noise.shape[2], num_repeat=noise.shape[1])
        x = pack(noise, clean, layout)
        t = pack(timestep, jnp.zeros(clean.shape[:2], jnp.float32), layout)
        frames = jnp.asarray(frame_positions(layout, FRAMES))
        velocity, stats = bind(config, params).sequence(x, t, text, frames, layout)
        return unpack_noise(velocity, layout), stats

    return SimpleNamespace(
        sequence_raw=sequence,
        sequence=jax.jit(sequence),
        text_kv=jax.jit(lambda params, text: bind(config, params).text_kv(text)),
        init_cache=jax.jit(
            lambda params, batch: bind(config, params).init_cache(batch), static_argnums=1
        ),
        denoise=jax.jit(lambda params, *args: bind(config, params).denoise(*args)),
        commit=jax.jit(lambda params, *args: bind(config, params).commit(*args)),
    )


def equations(jaxpr, name: str) -> list:
    """Every equation of that primitive in a jaxpr and all it calls."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            found.append(equation)
        for inner in jaxprs_in_params(equation.params):
            found += equations(inner, name)
    return found


def kernels_of(jaxpr) -> set[str]:
    """The names of the kernels in it."""
    return {equation.params["name"] for equation in equations(jaxpr, "pallas_call")}
