"""A script: how far a model with a position embedding is, on eight simulated devices, from itself
on one.

Prints the relative error of the velocity that `denoise` gives from a cache. As sharded.py, whose
functions it uses, it needs a process of its own.
"""

import sharded
from model_fixtures import tiny

MODEL = tiny(num_layers=1, mixer="window", position_embedding=True)

if __name__ == "__main__":
    one, many = (sharded.cached_velocity(MODEL, shape) for shape in (sharded.ONE, (1, 2, 4)))
    print(sharded.error(many, one))
