"""Checkpoints of the PyTorch world into Orbax and back: `convert_wan_weights.py` and its library.

- layouts.py     which kind of folder is this, and where in it is what
- tensors.py     tensors of safetensors and .pth files: named and shaped now, read later
- components.py  the DiT, the VAE and the text encoder: their tables and how sizes are read
- sizes.py       a DiT's sizes and LaCT options: config.json, shapes, flags, JSON
- matching.py    table against tensors: a complete assignment, or every mismatch at once
- fresh.py       LaCT parameters that a checkpoint does not have
- stream.py      Orbax writing and reading a layer at a time
- destination.py a folder that appears whole or not at all; its manifest
- importing.py   PyTorch -> Orbax
- origins.py, exporting.py    Orbax -> PyTorch
- shards.py, pth.py    safetensors and .pth files written tensor by tensor
- load.py        a converted folder into a model's parameters, on any mesh
"""

from lact_jax.convert.components import parse_options
from lact_jax.convert.exporting import Export, export_checkpoint
from lact_jax.convert.importing import Import, import_checkpoint
from lact_jax.convert.load import load_dit, load_text, load_vae, missing_parameters

__all__ = [
    "Export",
    "Import",
    "export_checkpoint",
    "import_checkpoint",
    "load_dit",
    "load_text",
    "load_vae",
    "missing_parameters",
    "parse_options",
]
