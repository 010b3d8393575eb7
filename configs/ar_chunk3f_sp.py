"""The sequence-parallel sister of `ar_chunk3f`: the whole model trains, tokens cut over devices.

Continues from an earlier checkpoint: give it with --config.init_from=FOLDER.
"""

from configs.ar_chunk3f import get_config as ar_chunk3f


def get_config():
    config = ar_chunk3f()
    config.train.update(
        steps=5000, lr=5e-6, weight_decay=0.0, accumulation=2, trainable="all", warmup_steps=1000
    )
    config.objective.drop_text_prob = 0.1
    config.data.batch_size = 2
    config.mesh.update(data=1, fsdp=1, seq=-1)
    return config
