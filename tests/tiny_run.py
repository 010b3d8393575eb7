"""The smallest run that has everything, as a config file: two chunks of 32 x 32 pixels, two layers.

The tests and `scripts/kill_and_resume.py` share it, so that its programs are compiled once. The
data folder is the caller's: `--config.data.path=FOLDER`.
"""

from ml_collections import ConfigDict

from lact_jax.config import default


def get_config():
    config = default()
    config.model.update(
        dim=24,
        ffn_dim=32,
        num_heads=2,
        num_layers=2,
        freq_dim=8,
        text_dim=8,
        text_len=4,
        remat="none",
        dtype="float32",
    )
    config.model.lact.update(fw_head_dim=12, inter_multi=1.0)
    config.codec.name = "pca"
    config.text.name = "words"
    config.text.options = ConfigDict({"text_len": 4, "text_dim": 8})
    config.data.update(
        name="synthetic", num_frames=21, height=32, width=32, batch_size=2, num_threads=1
    )
    config.data.options = ConfigDict({"num_shapes": 4, "num_rings": 2, "seed": 0})
    config.train.update(
        steps=8,
        lr=1e-2,
        schedule="constant",  # one program whatever the number of steps
        warmup_steps=2,
        trainable="all",
        ema_decay=0.9,
        save_every=3,
        keep_last=6,
        log_every=1,
        plot_every=100,
    )
    config.sample.update(steps=2, guidance_scale=3.0, num_latent_frames=6, batch_size=2)
    return config
