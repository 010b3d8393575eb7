"""The demo's data on a GPU: ten minutes on an H200 or H100."""

from ml_collections import ConfigDict

from configs.tiny import get_config as tiny


def get_config():
    config = tiny()
    config.model.update(
        patch_size=(1, 2, 2),
        dim=256, ffn_dim=1024, num_heads=4, num_layers=6, remat="none", dtype="bfloat16",
        # Trained this long it learns places from RoPE, as Wan does.
        position_embedding=False,
    )  # fmt: skip
    # What docs/memory found best. Muon's work grows with the square of a head's width: with 256 a
    # step takes about three times as long.
    config.model.lact.update(fw_head_dim=128, muon=True, momentum=True)
    config.data.update(path="runs/data/synthetic_1536", batch_size=32, num_threads=8)
    config.data.options = ConfigDict({"num_shapes": 1152, "num_rings": 384, "seed": 0})
    config.train.update(
        steps=2000,
        lr=1e-3,
        warmup_steps=100,
        ema_decay=0.995,
        save_every=1000,
        keep_last=2000,
        log_every=50,
        plot_every=500,
    )
    config.validation.update(every=500, num_clips=32)  # all that are held out
    config.sample.update(steps=50, guidance_scale=3.0)
    return config
