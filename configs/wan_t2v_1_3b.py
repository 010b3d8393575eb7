"""Plain Wan2.1 T2V-1.3B: full attention over the whole clip, to check a converted checkpoint.

    python sample.py --mode=full --config=configs/wan_t2v_1_3b.py --config.init_from=FOLDER ...
"""

from configs.ar_chunk3f import get_config as ar_chunk3f


def get_config():
    config = ar_chunk3f()
    config.model.mixer = "full"
    config.objective.frames_per_chunk = config.sample.num_latent_frames
    return config
