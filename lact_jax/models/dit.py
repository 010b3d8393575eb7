"""The Wan diffusion transformer over chunks, with a choice of sequence mixers.

Letters: B batch, C chunks, F latent frames of a chunk, h, w latent height and width, c latent
channels, S tokens of a chunk, D width, L text tokens, Q text width, N heads, K head width,
P = K / 2, n layers of a stack.

Layers of one kind are stacked: their parameters have a leading layer axis and `lax.scan` runs them.
Where layer kinds alternate with period p there are p stacks, `blocks["0"]` .. `blocks[str(p-1)]`,
and layer i is entry i // p of stack i % p.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec
from jax.tree_util import keystr

from lact_jax.models import layers
from lact_jax.models.block import MIXERS, Block, Head
from lact_jax.models.gla import GLAConfig
from lact_jax.models.lact import LaCTConfig
from lact_jax.models.layers import MLP, gelu_tanh, linear
from lact_jax.models.remat import REMAT_POLICIES
from lact_jax.models.sharded import ShardedDiT
from lact_jax.ops import kernels, parallel
from lact_jax.ops.layer_scan import scan_layers, unroll_layers
from lact_jax.ops.rope import rope_rotations
from lact_jax.ops.sequence import SequenceLayout


@dataclass(frozen=True)
class DiTConfig:
    """Sizes and options of the model; the defaults are Wan2.1 T2V-1.3B with LaCT layers.

    Attributes:
      mixer: a key of MIXERS, for every layer but those that `attn_every_n_layers` names: 'lact',
        'window' (window attention alone), 'gla' (and a gated linear state) or 'full' attention.
      attn_every_n_layers: layer i is full attention where (i + 1) is a multiple; 0 for none.
      lact: one LaCTConfig or several, cycled over the layers. 'window' and 'gla' take from it what
        they share with LaCT, the window's size for one.
      gla: the state of 'gla'.
      position_embedding: add a fixed embedding of a token's row and column to its patch. Without
        one, as in Wan, the place in the picture is only felt through RoPE's distances, which a
        model that trains from scratch is slow to learn from.
      remat: 'none', or a key of REMAT_POLICIES.
      unroll_layers: train on one device without a loop over layers: a program for each pass of a
        layer, instead of one for the whole step. It is faster and takes less memory.
      last_layers, last_remat: where layers are unrolled, so many of the last keep what `last_remat`
        says instead of `remat`; a multiple of `period`. Their memory is free again the soonest.
      dtype: matmul type, 'bfloat16' or 'float32'. Parameters are float32 whatever it is.
      kernels: 'auto' for Triton kernels where the device takes them, 'xla' for never, 'interpret'
        to run them on any device, slowly (ops/kernels).
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    latent_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    mixer: str = "lact"
    attn_every_n_layers: int = 0
    lact: tuple[LaCTConfig, ...] = (LaCTConfig(),)
    gla: GLAConfig = GLAConfig()
    position_embedding: bool = False
    remat: str = "full"
    unroll_layers: bool = False
    last_layers: int = 0
    last_remat: str = "dots"
    dtype: str = "bfloat16"
    kernels: str = "auto"

    def __post_init__(self):
        if self.mixer not in MIXERS:
            raise ValueError(f"model.mixer={self.mixer!r}: choose one of {sorted(MIXERS)}")
        for name in ("remat", "last_remat"):
            if (value := getattr(self, name)) != "none" and value not in REMAT_POLICIES:
                names = sorted({"none", *REMAT_POLICIES})
                raise ValueError(f"model.{name}={value!r}: choose one of {names}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"model.dtype={self.dtype!r}: choose 'bfloat16' or 'float32'")
        if self.kernels not in kernels.CHOICES:
            raise ValueError(f"model.kernels={self.kernels!r}: choose one of {kernels.CHOICES}")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"model.dim={self.dim} over model.num_heads={self.num_heads}: the head width must "
                "be a whole, even number"
            )
        if self.position_embedding and self.dim % 4:
            raise ValueError(
                f"model.dim={self.dim} with model.position_embedding: choose a multiple of 4, for "
                "the sine and cosine of a row and a column"
            )
        if not self.lact:
            raise ValueError("model.lact: give at least one set of options")
        if self.mixer == "lact" and (bad := [x for x in self.lact if self.dim % x.fw_head_dim]):
            raise ValueError(
                f"model.lact fw_head_dim={bad[0].fw_head_dim} does not divide model.dim={self.dim}"
            )
        if self.gla.head_dim and self.dim % self.gla.head_dim:
            raise ValueError(
                f"model.gla.head_dim={self.gla.head_dim} does not divide model.dim={self.dim}"
            )
        if self.last_layers and not self.unroll_layers:
            raise ValueError(
                f"model.last_layers={self.last_layers}: needs model.unroll_layers=True"
            )
        if self.last_layers % self.period or not 0 <= self.last_layers <= self.num_layers:
            raise ValueError(
                f"model.last_layers={self.last_layers}: choose a multiple of {self.period}, after "
                f"which layer kinds repeat, up to model.num_layers={self.num_layers}"
            )

    @property
    def layer_specs(self) -> tuple[tuple[str, LaCTConfig | None], ...]:
        """(mixer name, its LaCT options) of every layer."""
        every = self.attn_every_n_layers

        def spec(i):
            if self.mixer == "full" or (every and (i + 1) % every == 0):
                return "full", None
            return self.mixer, self.lact[i % len(self.lact)]

        return tuple(spec(i) for i in range(self.num_layers))

    @property
    def period(self) -> int:
        """Smallest p that divides num_layers such that layers repeat every p."""
        specs = self.layer_specs
        repeats = (
            p
            for p in range(1, self.num_layers + 1)
            if self.num_layers % p == 0 and specs == specs[:p] * (self.num_layers // p)
        )
        return next(repeats)


@partial(
    jax.tree_util.register_dataclass, data_fields=("layers", "num_committed"), meta_fields=()
)
@dataclass(frozen=True)
class Cache:
    """What sampling remembers: a stack of layer caches for each period entry, and the position.

    num_committed: int32 scalar, chunks committed so far. It places the next chunk in time.
    """

    layers: tuple
    num_committed: jax.Array


class DiT(nnx.Module):
    """The model: `sequence` for training, `init_cache`, `denoise` and `commit` for sampling.

    gather_layer: makes whole the states of a period's layers where a device has only parts of
      them (models/sharded.py); None where it has all.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        dim, period = config.dim, config.period
        self.config, self.gather_layer = config, None
        patch_width = config.latent_channels
        for size in config.patch_size:
            patch_width *= size
        f32, dtype = jnp.float32, config.dtype
        normal = nnx.initializers.normal(0.02)
        silu = jax.nn.silu
        self.patch_embedding = linear(patch_width, dim, dtype=dtype, rngs=rngs)
        self.text_embedding = MLP(
            config.text_dim, dim, dim, gelu_tanh, dtype=dtype, rngs=rngs, kernel_init=normal
        )
        self.time_embedding = MLP(
            config.freq_dim, dim, dim, silu, dtype=f32, rngs=rngs, kernel_init=normal
        )
        self.time_projection = linear(dim, 6 * dim, dtype=f32, rngs=rngs)
        stack = config.num_layers // period

        def blocks(spec):
            keys = jax.random.split(rngs.params(), stack)
            return jax.vmap(lambda key: Block(config, spec, rngs=nnx.Rngs(key)))(keys)

        specs = config.layer_specs[:period]
        self.blocks = nnx.Dict({str(i): blocks(spec) for i, spec in enumerate(specs)})
        self.head = Head(config, patch_width, rngs=rngs)

    # Pieces that training and sampling share.

    def _stacks(self):
        return tuple(nnx.split(self.blocks[str(i)]) for i in range(self.config.period))

    def _scan(self, body, carry, extra, train=False):
        """Scan over layers: body(carry, blocks of one period, extra of one period).

        train: it is differentiated, and reads most parameters of the layers (`scan_layers`).

        Raises:
          ValueError: layers are to be unrolled where several devices share a model.
        """
        graphs, states = zip(*self._stacks(), strict=True)
        remat, gather = self.config.remat, self.gather_layer

        def step(carry, inputs):
            states, extra = inputs
            states = states if gather is None else gather(states)
            merged = tuple(nnx.merge(g, s) for g, s in zip(graphs, states, strict=True))
            return body(carry, merged, extra)

        alone, unroll = not parallel.inside(), self.config.unroll_layers and train
        if unroll and not alone:
            raise ValueError("model.unroll_layers=True: a mesh of several devices needs False")

        def computed_again(remat):
            if remat == "none" and gather is None:
                return step
            policy = REMAT_POLICIES.get(remat, parallel.is_computed_here)
            return jax.checkpoint(step, policy=policy, prevent_cse=False)

        if unroll:
            config, period = self.config, self.config.period
            count, last = config.num_layers // period, config.last_layers // period
            bodies = [computed_again(remat)] * (count - last)
            bodies += [computed_again(config.last_remat)] * last
            return unroll_layers(bodies, carry, (states, extra))
        # Sampling relies on lax.scan to drop caches that no layer reads. Devices that share a model
        # keep to it too: simulated ones were once seen to wait for one another in the other scan.
        scan = scan_layers if train and alone else jax.lax.scan
        return scan(computed_again(remat), carry, (states, extra))

    def _time(self, timestep_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """e (B, C, D) and e0 (B, C, 6, D), float32."""
        e = self.time_embedding(layers.timestep_embedding(timestep_BC, self.config.freq_dim))
        e0 = self.time_projection(jax.nn.silu(e))
        return e, rearrange(e0, "b c (six d) -> b c six d", six=6)

    def _rotations(self, frame_CF: jax.Array, latent_hw: tuple[int, int]) -> jax.Array:
        frames, height, width = self.config.patch_size
        head_dim = self.config.dim // self.config.num_heads
        grid = latent_hw[0] // height, latent_hw[1] // width
        rotation_CSP2 = rope_rotations(frame_CF[:, ::frames] // frames, *grid, head_dim)
        return parallel.own_tokens(rotation_CSP2, axis=1)

    def _embed(self, x_BCFhwc: jax.Array) -> jax.Array:
        """The residual stream (B, C, S, D) that enters the blocks, float32."""
        patch, dim = self.config.patch_size, self.config.dim
        tokens = parallel.own_tokens(layers.patchify(x_BCFhwc, patch), axis=2)
        x_BCSD = self.patch_embedding(tokens).astype(jnp.float32)
        if not self.config.position_embedding:
            return x_BCSD
        grid = (size // by for size, by in zip(x_BCFhwc.shape[2:5], patch, strict=True))
        return x_BCSD + parallel.own_tokens(layers.position_embedding(*grid, dim), axis=0)

    def _run(self, x_BCFhwc, timestep_BC, text_kv, extra, mix, train=False):
        """Embeds, runs the blocks and projects back. `mix(mixer, y, extra_of_layer)`."""
        frames, height, width = x_BCFhwc.shape[2:5]
        x_BCSD = self._embed(x_BCFhwc)
        e, e0 = self._time(timestep_BC)

        def body(x, blocks, extra):
            aux = []
            for block, kv, item in zip(blocks, *extra, strict=True):
                x, out = block(x, e0, kv, lambda mixer, y, item=item: mix(mixer, y, item))
                aux.append(out)
            return x, tuple(aux)

        x_BCSD, aux = self._scan(body, x_BCSD, (text_kv, extra), train)
        out = parallel.all_tokens(self.head(x_BCSD, e), axis=2)
        return layers.unpatchify(out, self.config.patch_size, frames, height, width), aux

    def text_kv(self, text_BLQ: jax.Array) -> tuple:
        """Text keys and values of every layer, for `denoise` and `commit`.

        Args:
          text_BLQ: text embeddings (B, up to text_len, text_dim); padded here with zeros.

        Returns:
          For each period entry a pair of (n, B, L, N, K).
        """
        missing = self.config.text_len - text_BLQ.shape[1]
        if missing < 0:
            raise ValueError(
                f"text has {text_BLQ.shape[1]} tokens, the model takes {self.config.text_len}"
            )
        text_BLQ = jnp.pad(text_BLQ, ((0, 0), (0, missing), (0, 0)))
        text_BLD = self.text_embedding(text_BLQ.astype(self.config.dtype))

        def body(carry, blocks, extra):
            del extra
            return carry, tuple(block.cross_attn.text_kv(text_BLD) for block in blocks)

        return self._scan(body, None, None)[1]

    # Training.

    def sequence(
        self,
        x_BCFhwc: jax.Array,
        timestep_BC: jax.Array,
        text_BLQ: jax.Array,
        frame_CF: jax.Array,
        layout: SequenceLayout,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Predicts the velocity of every chunk of a teacher-forcing sequence.

        Args:
          x_BCFhwc: latents of the chunks, in the order of `SequenceLayout`.
          timestep_BC: in [0, 1000], one for each chunk.
          text_BLQ: text embeddings (B, up to text_len, text_dim).
          frame_CF: latent frame index of every frame (`frame_positions`).
          layout: the sequence's layout.

        Returns:
          The velocity, shaped like x, float32, and statistics: name -> (num_layers,) float32,
          NaN where a layer's mixer does not have the statistic.
        """
        rotation_CSP2 = self._rotations(frame_CF, x_BCFhwc.shape[3:5])

        def mix(mixer, y, _):
            return mixer.sequence(y, rotation_CSP2, layout)

        nothing = (None,) * self.config.period
        text_kv = self.text_kv(text_BLQ)
        out, stats = self._run(x_BCFhwc, timestep_BC, text_kv, nothing, mix, train=True)
        return out, parallel.mean_over_devices(_by_layer(stats, self.config))

    # Sampling.

    def init_cache(self, batch: int) -> Cache:
        """The cache before the first chunk."""

        def body(carry, blocks, extra):
            del extra
            return carry, tuple(block.self_attn.init_cache(batch) for block in blocks)

        return Cache(self._scan(body, None, None)[1], jnp.zeros((), jnp.int32))

    def cache_specs(self, batch_axes: tuple[str, ...]) -> Cache:
        """How the mesh cuts a cache whose batch is cut over `batch_axes`: PartitionSpecs."""
        mixers = (self.blocks[str(i)].self_attn for i in range(self.config.period))
        specs = tuple(mixer.cache_specs(batch_axes) for mixer in mixers)
        stacked = jax.tree.map(lambda spec: PartitionSpec(None, *spec), specs)
        return Cache(stacked, PartitionSpec())

    def _next_rotations(self, x_BFhwc, cache):
        frames = x_BFhwc.shape[1]
        frame_F = cache.num_committed * frames + jnp.arange(frames, dtype=jnp.int32)
        return self._rotations(frame_F[None], x_BFhwc.shape[2:4])[0]

    def denoise(
        self, x_BFhwc: jax.Array, timestep_B: jax.Array, text_kv: tuple, cache: Cache
    ) -> jax.Array:
        """Velocity of a noisy chunk that follows the committed ones, shaped like x."""
        rotation_SP2 = self._next_rotations(x_BFhwc, cache)

        def mix(mixer, y_BCSD, layer_cache):
            return mixer.denoise(y_BCSD[:, 0], rotation_SP2, layer_cache)[:, None], None

        out, _ = self._run(x_BFhwc[:, None], timestep_B[:, None], text_kv, cache.layers, mix)
        return out[:, 0]

    def commit(
        self, x_BFhwc: jax.Array, text_kv: tuple, cache: Cache, timestep: float = 0.0
    ) -> Cache:
        """Runs a finished chunk at `timestep` (0 for a clean one) and takes it into the cache."""
        rotation_SP2 = self._next_rotations(x_BFhwc, cache)
        timestep_BC = jnp.full((x_BFhwc.shape[0], 1), timestep, jnp.float32)

        def mix(mixer, y_BCSD, layer_cache):
            y_BSD, layer_cache = mixer.commit(y_BCSD[:, 0], rotation_SP2, layer_cache)
            return y_BSD[:, None], layer_cache

        _, layer_caches = self._run(x_BFhwc[:, None], timestep_BC, text_kv, cache.layers, mix)
        return replace(cache, layers=layer_caches, num_committed=cache.num_committed + 1)


def _by_layer(stats: tuple[dict, ...], config: DiTConfig) -> dict[str, jax.Array]:
    """Statistics of the stacks, (n,) each, as (num_layers,) in layer order."""
    names = sorted({name for stack in stats for name in stack})
    nothing = jnp.full((config.num_layers // config.period,), jnp.nan, jnp.float32)
    return {
        name: jnp.stack([stack.get(name, nothing) for stack in stats], axis=1).reshape(-1)
        for name in names
    }


# Parameters as plain nested dicts of arrays, and back.


def init_params(config: DiTConfig, key: jax.Array) -> dict:
    """Fresh parameters: a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(DiT(config, rngs=nnx.Rngs(key)), nnx.Param))


@lru_cache
def _graph(config: DiTConfig):
    abstract = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    return nnx.split(abstract)


def abstract_params(config: DiTConfig) -> dict:
    """Shapes and dtypes of the parameters, without computing them."""
    return nnx.to_pure_dict(_graph(config)[1])


def _check_fit(expected: dict, params: dict) -> None:
    want, have = (
        {keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (expected, params))
    )
    shapes = {f"{n} {have[n]}, not {want[n]}" for n in want.keys() & have if want[n] != have[n]}
    problems = {
        "missing": want.keys() - have.keys(),
        "unexpected": have.keys() - want.keys(),
        "of another shape": shapes,
    }
    if any(problems.values()):
        listed = (f"{what}: {', '.join(sorted(n))}" for what, n in problems.items() if n)
        raise ValueError(f"parameters that don't fit the model are {'; '.join(listed)}")


def bind(config: DiTConfig, params: dict) -> DiT | ShardedDiT:
    """The model with these parameters, cut over the mesh where one is traced for.

    Raises:
      ValueError: lists the parameters that are missing, unexpected or of another shape.
    """
    graphdef, state = _graph(config)
    _check_fit(nnx.to_pure_dict(state), params)
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, params)
    model = nnx.merge(graphdef, state)
    return model if parallel.mesh_shape() is None else ShardedDiT(model)
