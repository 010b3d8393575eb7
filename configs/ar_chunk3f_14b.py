"""`ar_chunk3f` on Wan2.1 T2V-14B; its fast weights have 4 heads of 1280."""

from configs.ar_chunk3f import get_config as ar_chunk3f


def get_config():
    config = ar_chunk3f()
    config.model.update(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    config.model.lact.fw_head_dim = 1280
    return config
