"""Samples clips from a trained model and writes a gallery.

    python sample.py --config=configs/tiny.py --workdir=runs/tiny --prompts=prompts.txt --out=clips
    python sample.py ... --prompt="a red circle moving left" --config.sample.num_latent_frames=42

    python sample.py --mode=full --config=configs/wan_t2v_1_3b.py --config.init_from=FOLDER ...

The last samples a converted Wan checkpoint as it is, the whole clip at once. How to sample stands
in config.sample: solver, steps, shift, guidance_scale, seed, num_latent_frames, batch_size,
weights ('ema' or 'params'), negative_prompt.
"""

from absl import app, flags
from ml_collections import config_flags

from lact_jax import cli
from lact_jax.config import parse
from lact_jax.gallery import read_prompts
from lact_jax.generate import MODES, generate

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run to sample; without it, config.init_from.")
MODE = flags.DEFINE_enum("mode", "ar", sorted(MODES), "Chunk by chunk, or the clip as a whole.")
PROMPTS = flags.DEFINE_string("prompts", None, "A text file, one prompt a line.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
OUT = flags.DEFINE_string("out", None, "The gallery's folder.")
STEP = flags.DEFINE_integer("checkpoint_step", None, "Default: the newest complete checkpoint.")
flags.mark_flags_as_required(["config", "out"])


def main(_):
    def run():
        if not PROMPTS.value and not PROMPT.value:
            raise ValueError("nothing to sample: give --prompts=FILE or --prompt=TEXT")
        prompts = list(PROMPT.value) + (read_prompts(PROMPTS.value) if PROMPTS.value else [])
        config = MODES[MODE.value](parse(CONFIG.value))
        page = generate(config, WORKDIR.value, prompts, OUT.value, STEP.value)
        print(f"wrote {page}")
        return 0

    cli.finish(run)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
