"""The PyTorch libraries as peers: their checkpoints in, forward equal; ours out, loaded by them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from convert_fixtures import (
    CONFIG_JSON,
    LACT,
    PLAIN,
    STEM,
    assert_same,
    random_tensors,
    read_all,
    write_wan,
)
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from flax import nnx
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from lact_jax.convert import (
    Export,
    Import,
    export_checkpoint,
    import_checkpoint,
    load_dit,
    load_text,
    load_vae,
    parse_options,
)
from lact_jax.models.dit import bind
from lact_jax.models.umt5 import umt5_encode
from lact_jax.models.vae_codec import abstract_vae
from lact_jax.ops.sequence import SequenceLayout, frame_positions
from lact_jax.wan_weights import official_name

RNG = np.random.default_rng(0)


class Transformer(WanTransformer3DModel):
    """diffusers keeps some modules in float32 only where `accelerate` is installed."""

    _keep_in_fp32_modules = None


def silent(_):
    """A log that nobody reads."""


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def randomise(module, seed=0):
    """Weights in which no norm is 1 and no bias is 0, so that forgetting one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.1)
    return module.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers folder of three small random models, converted, and exported again."""
    root = tmp_path_factory.mktemp("peers")
    transformer = randomise(
        Transformer(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=8, ffn_dim=40, num_layers=4, freq_dim=16,
        )
    )  # fmt: skip
    vae = randomise(AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1))
    text = randomise(
        UMT5EncoderModel(
            UMT5Config(
                vocab_size=40, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=4,
                relative_attention_num_buckets=16, feed_forward_proj="gated-gelu",
            )
        )
    )  # fmt: skip
    transformer.save_pretrained(root / "src" / "transformer", max_shard_size="20KB")
    vae.save_pretrained(root / "src" / "vae")
    text.save_pretrained(root / "src" / "text_encoder")
    import_checkpoint(Import(root / "src", root / "out"), log=silent)
    task = Export(root / "out", root / "back", "diffusers", max_shard_bytes=20_000)
    export_checkpoint(task, log=silent)
    return root, transformer, vae, text


def flow(params, latent, timestep, text):
    """The velocity of plain Wan in JAX, in the channel order of PyTorch."""
    x_BCFhwc = jnp.asarray(np.moveaxis(latent, 1, -1))[:, None]
    layout = SequenceLayout(num_chunks=1)
    frame_CF = jnp.asarray(frame_positions(layout, x_BCFhwc.shape[2]))
    velocity, _ = jax.jit(lambda p, *args: bind(PLAIN, p).sequence(*args, frame_CF, layout))(
        params, x_BCFhwc, jnp.asarray(timestep)[:, None], jnp.asarray(text)
    )
    return np.moveaxis(np.asarray(velocity)[:, 0], -1, 1)


def transformer_inputs():
    draw = [RNG.standard_normal(s).astype(np.float32) for s in ((2, 4, 3, 4, 6), (2, 6, 8))]
    return draw[0], np.float32([999.0, 250.5]), draw[1]


def test_transformer(folder):
    root, peer, _, _ = folder
    inputs = transformer_inputs()
    with torch.no_grad():
        latent, timestep, text = map(torch.from_numpy, inputs)
        want = peer(latent, timestep, text, return_dict=False)[0].numpy()
        back = Transformer.from_pretrained(root / "back", subfolder="transformer")
        again = back(latent, timestep, text, return_dict=False)[0].numpy()
    got = flow(load_dit(root / "out", PLAIN), *inputs)
    assert relative_error(got, want) < 1e-5
    np.testing.assert_array_equal(again, want)
    assert len(list((root / "back" / "transformer").glob("*.safetensors"))) > 2


def test_vae(folder):
    root, _, peer, _ = folder
    video = np.clip(RNG.standard_normal((1, 3, 5, 16, 16)), -1, 1).astype(np.float32)
    back = AutoencoderKLWan.from_pretrained(root / "back", subfolder="vae")
    with torch.no_grad():
        latent, again = (
            model.encode(torch.from_numpy(video)).latent_dist.mode() for model in (peer, back)
        )
        frames, frames_again = (model.decode(latent).sample for model in (peer, back))
    np.testing.assert_array_equal(again.numpy(), latent.numpy())
    np.testing.assert_array_equal(frames_again.numpy(), frames.numpy())

    config, params = load_vae(root / "out", "float32")
    graphdef, _ = abstract_vae(config)

    @jax.jit
    def encode_and_decode(params, video_BTHW3):
        vae = nnx.merge(graphdef, params)
        _, latent_BFhwC = vae.encode_chunk(None, video_BTHW3)
        return latent_BFhwC, vae.decode_chunk(None, latent_BFhwC)[1]

    z, x = encode_and_decode(params, np.moveaxis(video, 1, -1))
    mean, std = np.float32(config.latent_mean), np.float32(config.latent_std)
    assert relative_error(np.moveaxis(np.asarray(z) * std + mean, -1, 1), latent.numpy()) < 1e-5
    x_BCTHW = np.moveaxis(np.clip(np.asarray(x), -1, 1), -1, 1)
    assert relative_error(x_BCTHW, frames.numpy()) < 1e-5


def test_text_encoder(folder):
    root, _, _, peer = folder
    ids = RNG.integers(2, 40, (2, 7)).astype(np.int32)
    mask = np.int32([[1] * 7, [1] * 4 + [0] * 3])
    back = UMT5EncoderModel.from_pretrained(root / "back" / "text_encoder")
    with torch.no_grad():
        arguments = torch.from_numpy(ids), torch.from_numpy(mask)
        want = peer(*arguments).last_hidden_state.numpy()
        np.testing.assert_array_equal(back(*arguments).last_hidden_state.numpy(), want)
    config, params = load_text(root / "out", "float32", "float32")
    got = umt5_encode(config, params, ids, mask)
    assert relative_error(got, want * mask[..., None]) < 2e-6


def test_diffusers_round_trip_is_bit_equal_in_bfloat16(folder, tmp_path):
    _, transformer, _, _ = folder
    tensors = {name: t.to(torch.bfloat16) for name, t in transformer.state_dict().items()}
    home = tmp_path / "src" / "transformer"
    transformer.save_pretrained(home)
    save_file(tensors, home / f"{STEM}.safetensors", metadata={"format": "pt"})
    import_checkpoint(Import(tmp_path / "src", tmp_path / "out"), log=silent)
    export_checkpoint(Export(tmp_path / "out", tmp_path / "back", "diffusers"), log=silent)
    files = [root / "transformer" / f"{STEM}.safetensors"
             for root in (tmp_path / "src", tmp_path / "back")]  # fmt: skip
    before, after = (read_all([file]) for file in files)
    assert_same(after, before)
    export_checkpoint(Export(tmp_path / "out", tmp_path / "wan", "wan"), log=silent)
    official = read_all([tmp_path / "wan" / f"{STEM}.safetensors"])
    assert_same(official, {official_name(name): value for name, value in before.items()})


def test_lact_parameters_go_out_under_official_names(folder, tmp_path):
    """The peer loads what it knows of them, and says which it does not."""
    config = dataclasses.replace(PLAIN, mixer="lact", lact=(LACT,))
    tensors = random_tensors("dit", config, dtype=np.float32)
    write_wan(tmp_path / "src", tensors)
    import_checkpoint(Import(tmp_path / "src", tmp_path / "out"), log=silent)
    task = Export(tmp_path / "out", tmp_path / "back", "diffusers", max_shard_bytes=20_000)
    export_checkpoint(task, log=silent)
    index = tmp_path / "back" / "transformer" / f"{STEM}.safetensors.index.json"
    written = json.loads(index.read_text())["weight_map"]
    lact = {name for name in tensors if "blocks.2.self_attn.w" in name or "lr_proj" in name}
    assert lact and lact <= written.keys()
    peer, info = Transformer.from_pretrained(index.parent, output_loading_info=True)
    known = {official_name(name): value for name, value in peer.state_dict().items()}
    assert set(info["unexpected_keys"]) == tensors.keys() - known.keys()
    assert info["missing_keys"] == []
    for name, value in known.items():
        np.testing.assert_array_equal(value.numpy(), tensors[name])


def test_torch_saved_model_pt(tmp_path):
    """What torch.save writes is what the reader takes: bfloat16, parameters, a nested dict."""
    tensors = random_tensors("dit", PLAIN)
    saved = {
        f"_orig_mod.{name}": torch.nn.Parameter(
            torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16), requires_grad=False
        )
        for name, value in tensors.items()
    }
    (tmp_path / "src").mkdir()
    torch.save({"model": saved, "step": 10}, tmp_path / "src" / "model.pt")
    (tmp_path / "src" / "config.json").write_text(json.dumps(CONFIG_JSON))
    options = parse_options("eps=1e-5", None)
    import_checkpoint(Import(tmp_path / "src", tmp_path / "out", options=options), log=silent)
    export_checkpoint(Export(tmp_path / "out", tmp_path / "back", "wan"), log=silent)
    assert_same(read_all([tmp_path / "back" / f"{STEM}.safetensors"]), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eps"] == 1e-5
