"""The demo: two CPU cores, a few minutes, clips of 81 frames at 64 x 64 made by the project."""

from ml_collections import ConfigDict

from lact_jax.config import default


def get_config():
    config = default()

    # A token is a quarter of a latent frame: in minutes on a CPU a model learns what a part looks
    # like sooner than how many parts must agree. The width must not be below a patch's 256 values,
    # or the noise does not fit through a token.
    config.model.update(
        patch_size=(1, 4, 4),
        dim=384, ffn_dim=1024, num_heads=6, num_layers=3, freq_dim=64,
        text_dim=64, text_len=12,
        remat="none", dtype="float32",
        # In pure noise all tokens look alike, and RoPE knows distances alone: without it the shape
        # is drawn in every part of the picture at once.
        position_embedding=True,
    )  # fmt: skip
    # From docs/memory: an open gate (from scratch nothing needs it to start at zero), a learning
    # rate of their own for the fast weights' parameters, and momentum. Wider heads and Muon help
    # too, but not within the demo's ten minutes.
    config.model.lact.update(
        fw_head_dim=32, inter_multi=2.0, momentum=True, learnable_ttt_scale=False, ttt_scale=1.0
    )

    config.objective.update(
        frames_per_chunk=3, num_repeat=1, timestep_shift=3.0, drop_text_prob=0.1
    )

    config.codec.name = "pca"
    config.text.name = "words"
    config.data.update(
        name="synthetic",
        path="runs/data/synthetic",
        num_frames=81,
        height=64,
        width=64,
        fps=16.0,
        batch_size=8,
        num_threads=2,
        cache_in_memory=True,
    )

    config.data.options = ConfigDict({"num_shapes": 288, "num_rings": 72, "seed": 0})

    config.train.update(
        steps=360,
        lr=2e-3,
        schedule="cosine",
        warmup_steps=30,
        new_lr_multiplier=6.0,
        weight_decay=0.01,
        trainable="all",
        ema_decay=0.99,
        save_every=100,
        keep_last=200,
        log_every=1,
        plot_every=50,
    )
    config.sample.update(
        solver="unipc",
        steps=25,
        shift=3.0,
        guidance_scale=2.5,
        num_latent_frames=21,
        batch_size=20,
    )
    return config
