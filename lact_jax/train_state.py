"""The train state and the train step: pure functions over plain nested dicts of arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh

from lact_jax.config import Config
from lact_jax.models.dit import bind, init_params
from lact_jax.objective import compute_loss
from lact_jax.ops.layer_scan import PASSES
from lact_jax.ops.parallel import cut_clips
from lact_jax.optim import learning_rate, make_optimizer, merge, should_skip, split_trainable
from lact_jax.pieces import Pieces
from lact_jax.sharding import on_mesh


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a run is at a step.

    Attributes:
      step: int32 scalar, steps done, skipped ones included.
      params: trained parameters. frozen: the others.
      ema: moving average of the trained parameters; {} where train.ema_decay is 0.
      opt_state: the optimiser's.
      rng: key data (uint32) from which every step's randomness is derived.
    """

    step: jax.Array
    params: dict
    frozen: dict
    ema: dict
    opt_state: optax.OptState
    rng: jax.Array


def init_state(config: Config, params: dict | None = None) -> TrainState:
    """The state before the first step, from fresh parameters or from given ones."""
    params_key, step_key = jax.random.split(jax.random.key(config.seed))
    params = init_params(config.model, params_key) if params is None else params
    trained, frozen = split_trainable(params, config.train.trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        frozen=frozen,
        # A copy: donated buffers must not be shared between two fields.
        ema=jax.tree.map(jnp.copy, trained) if config.train.ema_decay else {},
        opt_state=make_optimizer(config.train).init(trained),
        rng=jax.random.key_data(step_key),
    )


def make_train_step(config: Config) -> Callable:
    """The step of a run: (state, latent (B, F, h, w, c), text (B, L, Q), empty text (L, Q)) ->
    (state, metrics). Not jitted, so that the caller decides shardings and donation."""
    train = config.train
    optimizer = make_optimizer(train)
    schedule = learning_rate(train, train.steps)

    def loss_fn(trained, frozen, latent, text, empty_text, key, first_sample):
        model = bind(config.model, merge(trained, frozen))
        loss, stats = compute_loss(
            model, latent, text, empty_text, key, config.objective, first_sample
        )
        return loss.loss, {"loss_by_chunk": loss.by_chunk_W, "layers": stats}

    def gradients(state, latent, text, empty_text, key):
        """Mean loss, metrics and gradients over the microbatches."""
        parts = train.accumulation
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

        def one(first_sample, latent, text):
            return grad_fn(
                state.params, state.frozen, latent, text, empty_text, key, first_sample
            )

        if parts == 1:
            return one(0, latent, text)
        if config.model.unroll_layers:
            return _over_calls(one, parts, latent, text)
        split = [
            cut_clips(rearrange(x, "(a b) ... -> a b ...", a=parts), axis=1) for x in (latent, text)
        ]
        starts = jnp.arange(parts) * split[0].shape[1]

        def body(total, inputs):
            return jax.tree.map(jnp.add, total, one(*inputs)), None

        shapes = jax.eval_shape(one, starts[0], split[0][0], split[1][0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(body, zeros, (starts, *split))
        return jax.tree.map(lambda x: x / parts, total)

    def step_fn(state: TrainState, latent, text, empty_text):
        """One optimiser step, as `make_train_step` describes it."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        (loss, aux), grads = gradients(state, latent, text, empty_text, key)
        grad_norm = optax.tree.norm(grads)
        lr = jnp.asarray(schedule(state.step), jnp.float32)
        skip = should_skip(loss, grad_norm, state.step, train)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        decay, ema = jnp.float32(train.ema_decay), {}
        if train.ema_decay:
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(skip, o, n), new, old)

        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            frozen=state.frozen,
            ema=keep(ema, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            rng=state.rng,
        )
        metrics = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": skip, **aux}
        return state, metrics

    return step_fn


def _over_calls(one: Callable, parts: int, latent: jax.Array, text: jax.Array):
    """The mean of one(first_sample, latent, text) over microbatches, by a call for each: of one
    function, which `Pieces` cuts once."""
    add = jax.jit(lambda total, *inputs: jax.tree.map(jnp.add, total, one(*inputs)))
    split = [jnp.split(x, parts) for x in (latent, text)]
    starts = [jnp.int32(i * len(split[0][0])) for i in range(parts)]
    shapes = jax.eval_shape(one, starts[0], split[0][0], split[1][0])
    total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    for inputs in zip(starts, *split, strict=True):
        total = add(total, *inputs)
    return jax.tree.map(lambda x: x / parts, total)


def jit_train_step(
    config: Config, mesh: Mesh | None = None, out_shardings: Any = None
) -> Callable:
    """`make_train_step`, compiled at its first call. It takes the place of the state.

    Args:
      config: the run's. Where layers are unrolled, their passes are programs of their own
        (`pieces`), else the step is one program.
      mesh: to trace for; None for one device.
      out_shardings: of its results, for one program.
    """
    step = make_train_step(config)
    if config.model.unroll_layers:
        return Pieces(step, PASSES, donate_argnums=(0,))
    step = step if mesh is None else on_mesh(mesh, step)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)
