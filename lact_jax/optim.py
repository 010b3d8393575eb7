"""The optimiser: AdamW with parameter groups, schedules, and the rule that skips bad updates.

Source: REFERENCE.md 5. Parameters are nested dicts; stacked layers stand under "blocks" with a
leading layer axis that the official tensors don't have.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

# Parameters that Wan does not have: they train at `new_lr_multiplier` times the learning rate.
NEW_PARAMETERS = frozenset({
    "w0", "w1", "w2", "qk_scale", "qk_offset", "lr_proj", "momentum_proj", "output_norm",
    "ttt_scale_proj", "initial_state", "decay_down", "decay_up",
})  # fmt: skip

SCHEDULES = {
    "cosine": lambda peak, decay_steps: optax.cosine_decay_schedule(peak, decay_steps),
    "linear": lambda peak, decay_steps: optax.linear_schedule(peak, 0.0, decay_steps),
    "constant": lambda peak, decay_steps: optax.constant_schedule(peak),
}


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
      lr: peak learning rate.
      schedule: 'cosine' or 'linear' (both to 0 at the last step) or 'constant'.
      warmup_steps: linear warm-up from 0.
      new_lr_multiplier: factor on the learning rate of NEW_PARAMETERS.
      weight_decay: on tensors of two or more dimensions (layer axis not counted).
      clip_norm: global norm that gradients are clipped to.
      skip_factor, skip_after: from step `skip_after` on, an update whose norm is over
        `skip_factor` * `clip_norm` is skipped. One that is not finite always is.
    """

    lr: float = 2e-5
    schedule: str = "cosine"
    warmup_steps: int = 1000
    new_lr_multiplier: float = 10.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    skip_factor: float = 10.0
    skip_after: int = 200

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"train.schedule={self.schedule!r}: choose one of {sorted(SCHEDULES)}")
        if self.warmup_steps < 0:
            raise ValueError(f"train.warmup_steps={self.warmup_steps}: must be at least 0")
        for name in ("lr", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be positive")


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: warm-up, then the named schedule over what is left of `steps`."""
    after = SCHEDULES[config.schedule](config.lr, max(steps - config.warmup_steps, 1))
    if config.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def _keys(path) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)


def is_new(path) -> bool:
    """Whether a parameter's key path names one that Wan does not have."""
    return not NEW_PARAMETERS.isdisjoint(_keys(path))


def decays(path, x: jax.Array) -> bool:
    """Whether weight decay applies: two or more dimensions, the layer axis not counted."""
    return x.ndim - (_keys(path)[0] == "blocks") >= 2


TRAINABLE = {
    "all": lambda path: True,
    "attn_only": lambda path: "self_attn" in _keys(path),
}


def split_trainable(params: dict, trainable: str) -> tuple[dict, dict]:
    """Splits parameters into (trained, frozen), nested dicts without empty groups.

    `trainable` is a key of TRAINABLE.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    trained: dict = {}
    frozen: dict = {}
    for path, leaf in leaves:
        group = trained if TRAINABLE[trainable](path) else frozen
        keys = _keys(path)
        for key in keys[:-1]:
            group = group.setdefault(key, {})
        group[keys[-1]] = leaf
    return trained, frozen


def merge(trained: dict, frozen: dict) -> dict:
    """The inverse of `split_trainable`."""
    merged = dict(trained)
    for key, value in frozen.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return merged


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Everything but the learning rate, which the train step takes from its own step count."""

    def mask(rule):
        return lambda params: jax.tree_util.tree_map_with_path(rule, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask(decays)),
        optax.masked(
            optax.scale(config.new_lr_multiplier), mask(lambda path, x: is_new(path))
        ),
    )


def should_skip(
    loss: jax.Array, grad_norm: jax.Array, step: jax.Array, config: OptimConfig
) -> jax.Array:
    """Whether this update is skipped: a bool scalar."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spike = (step >= config.skip_after) & (grad_norm > config.skip_factor * config.clip_norm)
    return ~finite | spike
