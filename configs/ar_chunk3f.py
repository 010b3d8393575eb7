"""Wan2.1 T2V-1.3B as a LaCT autoregressive model: chunks of 3 latent frames, 81 x 480 x 832.

The recipe of the official config `ar_chunk3f` (docs/REFERENCE.md 5): window attention inside a
chunk and to the one before, fast weights of two heads of 768 for all that is older.
"""

from ml_collections import ConfigDict

from lact_jax.config import default


def get_config():
    config = default()

    config.model.update(
        dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, remat="full", dtype="bfloat16"
    )
    config.model.lact.update(fw_head_dim=768, inter_multi=2.0, weight_norm=True, muon=False)

    config.objective.update(
        frames_per_chunk=3,
        num_repeat=1,
        adjust_timestep_shift=True,  # 2.11 at 4680 tokens a chunk
        time_sampling="uniform",
        logit_normal_weighting=True,
        logit_normal_std=1.0,
        drop_text_prob=0.1,
    )

    # The VAE and the text encoder come from the converted folder that --config.init_from names.
    folder = config.get_ref("init_from")
    config.codec.name = "wan"
    config.codec.options = ConfigDict({"path": folder, "dtype": "bfloat16", "tiled": False})
    config.text.name = "umt5"
    config.text.options = ConfigDict({"path": folder, "cache_dir": "runs/cache/umt5"})
    config.data.update(
        name="video_folder", num_frames=81, height=480, width=832, fps=16.0, batch_size=1,
        holdout=16,
    )  # fmt: skip
    config.validation.update(every=500, num_clips=16)  # all that are held out

    config.train.update(
        steps=10_000,
        lr=2e-5,
        schedule="cosine",
        warmup_steps=1000,
        new_lr_multiplier=10.0,
        weight_decay=0.01,
        clip_norm=1.0,
        trainable="attn_only",
        ema_decay=0.995,
        save_every=1000,
        keep_last=2000,
    )
    config.sample.update(
        solver="unipc", steps=50, shift=3.0, guidance_scale=5.0, num_latent_frames=21
    )
    return config
