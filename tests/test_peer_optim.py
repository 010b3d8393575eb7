"""The optimiser against `torch.optim.AdamW` with parameter groups, clipping and a schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lact_jax.optim import OptimConfig, learning_rate, make_optimizer

# Name -> shape, whether new (10 x lr), whether decayed. "blocks" have a layer axis in front.
TENSORS = {
    ("patch_embedding", "kernel"): ((6, 5), False, True),
    ("patch_embedding", "bias"): ((5,), False, False),
    ("blocks", "0", "norm3", "scale"): ((3, 5), False, False),
    ("blocks", "0", "modulation"): ((3, 6, 5), False, True),
    ("blocks", "0", "self_attn", "q", "kernel"): ((3, 5, 5), False, True),
    ("blocks", "0", "self_attn", "w0"): ((3, 2, 4, 2), True, True),
    ("blocks", "0", "self_attn", "qk_offset"): ((3, 5, 2), True, True),
    ("blocks", "0", "self_attn", "lr_proj", "bias"): ((3, 6), True, False),
}
STEPS = 6


def nested(values: dict) -> dict:
    tree: dict = {}
    for keys, value in values.items():
        group = tree
        for key in keys[:-1]:
            group = group.setdefault(key, {})
        group[keys[-1]] = jnp.asarray(value)
    return tree


def draw(seed: int, scale: float) -> dict:
    rng = np.random.default_rng(seed)
    return {
        keys: (scale * rng.standard_normal(shape)).astype(np.float32)
        for keys, (shape, _, _) in TENSORS.items()
    }


def torch_steps(config: OptimConfig, params: dict, grads: list[dict], lrs: list[float]) -> dict:
    tensors = {keys: torch.nn.Parameter(torch.tensor(value)) for keys, value in params.items()}
    groups = [
        {
            "params": [tensors[k] for k, (_, *is_in) in TENSORS.items() if is_in == [new, decays]],
            "weight_decay": config.weight_decay if decays else 0.0,
            "factor": config.new_lr_multiplier if new else 1.0,
        }
        for new in (False, True)
        for decays in (False, True)
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.b1, config.b2), eps=config.eps
    )
    for step_grads, lr in zip(grads, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        for keys, value in step_grads.items():
            tensors[keys].grad = torch.tensor(value)
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), config.clip_norm)
        optimizer.step()
    return {keys: tensor.detach().numpy() for keys, tensor in tensors.items()}


def test_several_steps_agree_with_torch():
    config = OptimConfig(lr=2e-2, warmup_steps=2, weight_decay=0.2, clip_norm=3.0)
    params = draw(0, 1.0)
    grads = [draw(1 + i, 0.05 * 3**i) for i in range(STEPS)]  # clipped from the middle on
    schedule = learning_rate(config, STEPS)
    lrs = [float(schedule(i)) for i in range(STEPS)]
    expected = torch_steps(config, params, grads, lrs)

    optimizer = make_optimizer(config)
    ours = nested(params)
    state = optimizer.init(ours)
    for step_grads, lr in zip(grads, lrs, strict=True):
        updates, state = optimizer.update(nested(step_grads), state, ours)
        ours = jax.tree.map(lambda p, u, lr=lr: p - lr * u, ours, updates)
    leaves = jax.tree_util.tree_leaves_with_path(ours)
    assert len(leaves) == len(expected)
    for path, value in leaves:
        keys = tuple(entry.key for entry in path)
        moved = np.linalg.norm(expected[keys] - params[keys])
        assert np.linalg.norm(value - expected[keys]) < 2e-5 * moved, keys
