"""How each kind of golden case is computed here, as a table: KINDS[kind](config, tensors).

Every function yields (name, value, expected, tolerance) for each result; tolerances are those that
golden/README.md gives. Letters as in objective.py and fast_weights.py.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from flax.traverse_util import unflatten_dict

from lact_jax import umt5_weights, vae_weights
from lact_jax.diffusion import flow
from lact_jax.diffusion.sampler import SamplerConfig, guide, sample_chunks
from lact_jax.diffusion.solvers import make_schedule
from lact_jax.models.dit import DiTConfig, bind
from lact_jax.models.lact import LaCTConfig
from lact_jax.models.umt5 import UMT5Config, umt5_encode
from lact_jax.models.vae import VAEConfig
from lact_jax.models.vae_codec import abstract_vae
from lact_jax.objective import (
    Draws,
    ObjectiveConfig,
    build_sequence,
    loss_from_prediction,
    split_chunks,
)
from lact_jax.ops import fast_weights as fw
from lact_jax.ops.sequence import SequenceLayout, frame_positions, unpack_noise
from lact_jax.wan_weights import params_from_torch, params_to_torch

FORWARD, WEIGHTS = 1e-5, 2e-4
OP_GRADIENT, OP_GRADIENT_MUON = 1e-5, 1e-4
TRAIN_GRADIENT, TRAIN_GRADIENT_OWN_WEIGHTS = 5e-4, 1e-4
ROLLOUT, EXACT, TEXT = 1e-4, 0.0, 2e-6
ROUNDING = 1e-7  # a GPU divides to within an ulp or two, a CPU exactly

Computed = Iterator[tuple[str, object, object, float]]
W_INIT_NAMES = {"clean": "normal", "identity": "identity"}


def _group(tensors: dict, prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def model_config(config: dict) -> DiTConfig:
    """The model of a case, from the official options in its header."""
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len")
    sizes = {name: config[name] for name in names}
    common = dict(
        sizes,
        latent_channels=config["in_dim"],
        patch_size=tuple(config["patch_size"]),
        eps=config.get("eps", 1e-6),
        dtype=config.get("compute_dtype", "float32"),
        remat="none",
    )
    if "lact" not in config:
        return DiTConfig(**common, mixer="full")
    official = config["lact"]
    lact = LaCTConfig(
        fw_head_dim=official["fw_head_dim"],
        inter_multi=official["inter_multi"],
        qk_l2_norm=official["qk_l2_norm"],
        qkv_silu=official["qkv_silu"],
        o_norm=official["o_norm"],
        w_init=W_INIT_NAMES[official["w_init"]],
        muon=official["use_moun"],
        muon_iters=official["num_moun_iters"],
        weight_norm=official["weight_norm"],
        learnable_ttt_scale=official["learnable_ttt_scale"],
        ttt_scale=official["ttt_scale"],
    )
    every = config["attn_every_n_layers"]
    return DiTConfig(**common, lact=(lact,), attn_every_n_layers=every)


# kind: fast_weights


def fast_weights(config: dict, tensors: dict) -> Computed:
    """The bare operation and its gradients; tokens in the official, interleaved order."""
    inputs = _group(tensors, "in.")
    cotangent = inputs.pop("do")
    repeat, tokens = config["num_repeat"], config["chunk_tokens"]
    chunks = cotangent.shape[1] // tokens
    layout = SequenceLayout((chunks + 1) // (repeat + 1), repeat)
    rule = fw.UpdateRule(
        config["momentum"], config["muon"], config["muon_iters"], config["weight_norm"]
    )

    @jax.jit
    def operation(inputs):
        """<o, do> of the whole sequence, and its outputs in the official order."""
        def grouped(name):
            x_BCSX = rearrange(inputs[name], "b (c s) x -> b c s x", c=chunks)
            return x_BCSX[:, np.argsort(layout.interleaved())]

        def clean(name):
            return rearrange(grouped(name)[:, layout.clean], "b c s x -> c b 1 s x")

        def rounded(x):
            return x.astype(config["compute_dtype"])

        initial = fw.from_matrices(*(inputs[w][:, None] for w in ("w0", "w1", "w2")))
        lr = jnp.concatenate([clean("lr0"), clean("lr1"), clean("lr2")], axis=-1)
        momentum = jnp.mean(clean("momentum"), axis=(-2, -1)) if rule.momentum else None
        q_first = rearrange(grouped("q")[:, layout.first], "b r s e -> b 1 (r s) e")
        q_later = rearrange(grouped("q")[:, layout.later], "b (w r) s e -> w b 1 (r s) e", r=repeat)
        state, (o_clean, o_later) = fw.scan_chunks(
            initial,
            fw.Chunk(rounded(clean("k")), rounded(clean("v")), lr, momentum),
            (rounded(clean("q")), rounded(q_later)),
            rule,
        )
        o = jnp.concatenate(
            [
                rearrange(fw.read(initial, rounded(q_first)), "b 1 (r s) e -> b r s e", r=repeat),
                rearrange(o_clean, "w b 1 s e -> b w s e"),
                rearrange(o_later, "w b 1 (r s) e -> b (w r) s e", r=repeat),
            ],
            axis=1,
        )[:, layout.interleaved()]
        o = rearrange(o, "b c s e -> b (c s) e")
        w0, w1, w2 = (w[:, 0] for w in fw.to_matrices(state.weights))
        return jnp.sum(o.astype(jnp.float32) * cotangent), {"o": o, "w0": w0, "w1": w1, "w2": w2}

    (_, outputs), gradients = jax.jit(jax.value_and_grad(operation, has_aux=True))(inputs)
    for name, expected in _group(tensors, "out.").items():
        yield f"out.{name}", outputs[name], expected, FORWARD
    tolerance = OP_GRADIENT_MUON if config["muon"] else OP_GRADIENT
    for name, expected in _group(tensors, "grad.").items():
        yield f"grad.{name}", gradients[name], expected, tolerance


# kind: train


def _channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def _channels_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -3)


def _train_step(model: DiTConfig, sequence, text, layout: SequenceLayout, velocity_target):
    """A compiled (params, loss weights) -> (gradients, (velocity, statistics)).

    One function for both passes: its compilation is what a case spends its time on.
    """
    frame_CF = jnp.asarray(frame_positions(layout, sequence[0].shape[2]))

    def loss(params, weight_BRW):
        velocity, stats = bind(model, params).sequence(*sequence, text, frame_CF, layout)
        error = jnp.square(unpack_noise(velocity, layout) - velocity_target)
        error_BRW = reduce(error, "b r w ... -> b r w", "mean")
        return jnp.mean(weight_BRW * error_BRW), (velocity, stats)

    return jax.jit(jax.grad(loss, has_aux=True))


def train(config: dict, tensors: dict) -> Computed:
    """A training sequence: everything from the noised input to every parameter's gradient."""
    model = model_config(config)
    params = params_from_torch(_group(tensors, "param."), model)
    inputs, expected = _group(tensors, "in."), _group(tensors, "out.")
    objective = ObjectiveConfig(
        frames_per_chunk=config["ar_window"],
        num_repeat=config["num_repeat"],
        timestep_shift=config["timestep_shift"],
        time_sampling=config["timestep_sample_method"],
        logit_normal_weighting=config["logit_normal_weighting"],
        logit_normal_std=config["logit_normal_std"],
    )
    chunks = split_chunks(jnp.asarray(_channels_last(inputs["latent"])), config["ar_window"])
    layout = SequenceLayout(chunks.shape[1], config["num_repeat"])
    draws = Draws(
        jnp.asarray(_channels_last(inputs["noise"]))[None],
        jnp.asarray(inputs["u"])[None],
        jnp.zeros((1,), bool),
    )
    x, timestep_BC = build_sequence(chunks, draws, config["timestep_shift"], layout)
    target = flow.velocity_target(chunks[:, None], draws.noise)
    step = _train_step(model, (x, timestep_BC), jnp.asarray(inputs["text"]), layout, target)
    weight_BRW = flow.logit_normal_weight(draws.u_BRW, objective.logit_normal_std)
    gradients, (velocity, stats) = step(params, weight_BRW)
    case_gradients, _ = step(params, jnp.asarray(expected["loss_weight"])[None])
    prediction = unpack_noise(velocity, layout)
    loss = loss_from_prediction(prediction, chunks, draws, objective)
    order = layout.interleaved()
    exact = EXACT if jax.default_backend() == "cpu" else ROUNDING
    timesteps = flow.MODEL_TIME_SCALE * flow.shift_time(draws.u_BRW, config["timestep_shift"])
    values = {
        "noisy": (_channels_first(unpack_noise(x, layout)[0]), FORWARD),
        "timestep": (timesteps[0], exact),
        "ar_input": (_channels_first(x[0, order]), FORWARD),
        "ar_timestep": (timestep_BC[0, order], exact),
        "ar_flow_pred": (_channels_first(velocity[0, order]), FORWARD),
        "flow_pred": (_channels_first(prediction[0]), FORWARD),
        "chunk_loss": (loss.by_chunk_W, FORWARD),
        "loss_weight": (weight_BRW[0], WEIGHTS),
        "loss": (loss.loss[None], WEIGHTS),
    }
    for name, (value, tolerance) in values.items():
        yield f"out.{name}", value, expected[name], tolerance
    for name, value in _group(tensors, "stat.").items():
        layer, _, statistic = name.removeprefix("block_").partition(".")
        yield f"stat.{name}", stats[statistic][int(layer)][None], value, FORWARD
    for label, computed, tolerance in (
        ("grad", gradients, TRAIN_GRADIENT),
        ("grad[case weights]", case_gradients, TRAIN_GRADIENT_OWN_WEIGHTS),
    ):
        computed = params_to_torch(computed, model)
        for name, value in _group(tensors, "grad.").items():
            yield f"{label}.{name}", computed[name], value, tolerance


# kind: rollout, wan_forward


def rollout(config: dict, tensors: dict) -> Computed:
    """Autoregressive sampling with guidance, from given noise."""
    model_cfg = model_config(config)
    params = params_from_torch(_group(tensors, "param."), model_cfg)
    model = bind(model_cfg, jax.tree.map(jnp.asarray, params))
    inputs, expected = _group(tensors, "in."), _group(tensors, "out.")
    sampler = SamplerConfig(
        config["solver"], config["steps"], config["shift"], config["guide_scale"]
    )
    length = model_cfg.text_len
    text = [np.pad(inputs[n], ((0, 0), (0, length - inputs[n].shape[1]), (0, 0)))
            for n in ("text", "neg_text")]  # fmt: skip
    text_kv = model.text_kv(jnp.concatenate(text))
    schedule = sampler.schedule

    @jax.jit
    def denoise(x, timestep, cache):
        double = jnp.concatenate([x, x]), jnp.concatenate([timestep, timestep])
        return guide(model.denoise(*double, text_kv, cache), sampler.guidance_scale)

    @jax.jit
    def commit(x, cache):
        return model.commit(jnp.concatenate([x, x]), text_kv, cache)

    noise_Fhwc = np.moveaxis(inputs["noise"], 0, -1)
    chunks = split_chunks(jnp.asarray(noise_Fhwc)[None], config["ar_window"])
    noise_W = (chunks[:, i] for i in range(chunks.shape[1]))
    finished = list(sample_chunks(denoise, commit, model.init_cache(2), noise_W, schedule))
    latent = np.concatenate([_channels_first(x) for x in finished], axis=1)
    yield "out.latent", latent, expected["latent"], ROLLOUT
    yield "out.sigmas", schedule.sigmas, expected["sigmas"], FORWARD
    yield "out.timesteps", schedule.timesteps, expected["timesteps"], EXACT


def wan_forward(config: dict, tensors: dict) -> Computed:
    """Plain Wan: one chunk that holds the whole clip, full attention."""
    model = model_config(config)
    params = params_from_torch(_group(tensors, "param."), model)
    inputs = _group(tensors, "in.")
    x_BCFhwc = jnp.asarray(np.moveaxis(inputs["latent"], 1, -1))[:, None]
    layout = SequenceLayout(num_chunks=1)
    frame_CF = jnp.asarray(frame_positions(layout, x_BCFhwc.shape[2]))
    forward = jax.jit(
        lambda params, *args: bind(model, params).sequence(*args, frame_CF, layout)[0]
    )
    timestep = jnp.asarray(inputs["timestep"])[:, None]
    velocity = forward(params, x_BCFhwc, timestep, jnp.asarray(inputs["text"]))
    flow_BcFhw = np.moveaxis(np.asarray(velocity)[:, 0], -1, 1)
    yield "out.flow", flow_BcFhw, tensors["out.flow"], FORWARD


# kind: solver, flow_tables


def solver(config: dict, tensors: dict) -> Computed:
    """A solver's whole trajectory over given velocities."""
    schedule = make_schedule(config["solver"], config["steps"], config["shift"])
    step = jax.jit(schedule.solver.step)
    state = schedule.solver.init(jnp.asarray(tensors["in.x"]))
    trajectory = [state.x]
    for i, velocity in enumerate(tensors["in.velocity"]):
        state = step(state, jnp.asarray(velocity), schedule.coefficients_at(i))
        trajectory.append(state.x)
    yield "out.x", jnp.stack(trajectory), tensors["out.x"], FORWARD
    yield "out.sigmas", schedule.sigmas, tensors["out.sigmas"], FORWARD
    yield "out.timesteps", schedule.timesteps, tensors["out.timesteps"], EXACT


def flow_tables(config: dict, tensors: dict) -> Computed:
    """Loss weights, shifted times and the shift by token count; the argument is in the name."""
    del config
    u = jnp.asarray(tensors["in.u"])
    for name, expected in _group(tensors, "out.").items():
        if name == "resolution_shift":
            shifts = [flow.resolution_shift(int(n)) for n in tensors["in.tokens"]]
            yield f"out.{name}", shifts, expected, FORWARD
        elif name.startswith("shifted_"):
            shift = float(name.removeprefix("shifted_"))
            yield f"out.{name}", flow.shift_time(u, shift), expected, FORWARD
        else:
            std = float(name.removeprefix("weight_std"))
            yield f"out.{name}", flow.logit_normal_weight(u, std), expected, WEIGHTS


# kind: vae, umt5


def vae(config: dict, tensors: dict) -> Computed:
    """The Wan VAE: normalised latent of a video, and the unclamped decoding of that latent."""
    sizes = {name: config[name] for name in ("dim", "z_dim", "num_res_blocks")}
    tuples = {name: tuple(config[name]) for name in ("dim_mult", "temporal_downsample")}
    cfg = VAEConfig(**sizes, **tuples, dtype=config["compute_dtype"])
    given = _group(tensors, "param.")
    flat = {
        row.jax: jnp.asarray(vae_weights.TRANSFORMS[row.transform].to_jax(given[row.wan]))
        for row in vae_weights.rows(cfg)
    }
    model = nnx.merge(abstract_vae(cfg)[0], unflatten_dict(flat, sep="/"))
    video, latent = (np.moveaxis(tensors[name], 1, -1) for name in ("in.video", "out.latent"))
    encoded = jax.jit(model.encode_chunk)(None, video)[1]
    decoded = jax.jit(model.decode_chunk)(None, latent)[1]
    yield "out.latent", encoded, latent, FORWARD
    yield "out.video", np.moveaxis(np.asarray(decoded), -1, 1), tensors["out.video"], FORWARD


def umt5(config: dict, tensors: dict) -> Computed:
    """The text encoder: embeddings, zero after the text's end."""
    fields = {field.name for field in dataclasses.fields(UMT5Config)}
    cfg = UMT5Config(**{name: value for name, value in config.items() if name in fields})
    table = umt5_weights.rows(cfg, "wan")
    params = params_from_torch(_group(tensors, "param."), cfg, table)
    ids, mask = (tensors[name].astype(np.int32) for name in ("in.ids", "in.mask"))
    yield "out.embeds", umt5_encode(cfg, params, ids, mask), tensors["out.embeds"], TEXT


KINDS = {
    "fast_weights": fast_weights,
    "train": train,
    "rollout": rollout,
    "wan_forward": wan_forward,
    "solver": solver,
    "flow_tables": flow_tables,
    "vae": vae,
    "umt5": umt5,
}
