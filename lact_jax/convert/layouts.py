"""Recognises what kind of checkpoint a folder is, and finds the components in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lact_jax.convert.errors import ConversionError
from lact_jax.convert.tensors import shard_files

VAE_PTH = "Wan2.1_VAE.pth"
TEXT_PTH = "models_t5_umt5-xxl-enc-bf16.pth"
WEIGHTS = "diffusion_pytorch_model"
TEXT_WEIGHTS = "model"
TOKENIZERS = {"wan": "google/umt5-xxl", "diffusers": "tokenizer"}


@dataclass(frozen=True)
class Part:
    """The files of one component, and its config.json where there is one."""

    files: tuple[Path, ...]
    config: Path | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk: its layout's name, its components, its tokenizer's folder."""

    layout: str
    parts: Mapping[str, Part] = field(default_factory=dict)
    tokenizer: Path | None = None


def _part(files: tuple[Path, ...], config: Path | None = None) -> Part | None:
    return Part(files, config if config and config.is_file() else None) if files else None


def _existing(file: Path) -> tuple[Path, ...]:
    return (file,) if file.is_file() else ()


def _folder(path: Path) -> Path | None:
    return path if path.is_dir() else None


def _source(layout: str, parts: Mapping[str, Part | None], tokenizer: Path | None = None) -> Source:
    return Source(layout, {k: part for k, part in parts.items() if part is not None}, tokenizer)


def _wan(folder: Path) -> Source:
    return _source(
        "wan",
        {
            "dit": _part(shard_files(folder, WEIGHTS), folder / "config.json"),
            "vae": _part(_existing(folder / VAE_PTH)),
            "text": _part(_existing(folder / TEXT_PTH)),
        },
        _folder(folder / TOKENIZERS["wan"]),
    )


def _diffusers(folder: Path) -> Source:
    places = {
        "dit": ("transformer", WEIGHTS),
        "vae": ("vae", WEIGHTS),
        "text": ("text_encoder", TEXT_WEIGHTS),
    }
    parts = {
        name: _part(shard_files(folder / place, stem), folder / place / "config.json")
        for name, (place, stem) in places.items()
    }
    return _source("diffusers", parts, _folder(folder / TOKENIZERS["diffusers"]))


def _lact(folder: Path) -> Source:
    dit = _part(_existing(folder / "model.pt"), folder / "config.json")
    return _source("lact", {"dit": dit})


LAYOUTS = {"wan": _wan, "diffusers": _diffusers, "lact": _lact}
_EXPECTED = f"""\
a Wan2.1 folder ({WEIGHTS}*.safetensors, {VAE_PTH}, {TEXT_PTH}), a diffusers folder
(transformer/, vae/, text_encoder/), or a LaCT-AR folder or file (model.pt)"""


def recognise(src: str | Path) -> Source:
    """The checkpoint at `src`: a folder of a known layout, or one file with a DiT's weights.

    Raises FileNotFoundError; ConversionError when nothing or more than one thing is recognised.
    """
    src = Path(src)
    if src.is_file():
        if src.suffix not in (".pt", ".pth", ".safetensors"):
            raise ConversionError(f"{src}: not a .pt, .pth or .safetensors file")
        return _source("file", {"dit": _part((src,), src.parent / "config.json")})
    if not src.is_dir():
        raise FileNotFoundError(f"--src={src}: no such file or folder")
    found = [source for look in LAYOUTS.values() if (source := look(src)).parts]
    if not found:
        held = ", ".join(sorted(p.name for p in src.iterdir())[:12]) or "nothing"
        raise ConversionError(f"{src}: not {_EXPECTED}; it holds {held}")
    if len(found) > 1:
        names = [f"{s.layout} ({', '.join(s.parts)})" for s in found]
        raise ConversionError(
            f"{src}: several checkpoints in one folder: {'; '.join(names)}. Give the file itself, "
            "or move them apart"
        )
    return found[0]


def select(source: Source, only: tuple[str, ...] | None) -> dict[str, Part]:
    """The components asked for (all that are there by default).

    Raises ConversionError listing the components that are unknown or not there.
    """
    if only is None:
        return dict(source.parts)
    if unknown := sorted(set(only) - {"dit", "vae", "text"}):
        raise ConversionError(f"--only={','.join(unknown)}: choose from dit, vae, text")
    if missing := [name for name in only if name not in source.parts]:
        raise ConversionError(
            f"--only={','.join(missing)}: not in the source, which has {', '.join(source.parts)}"
        )
    return {name: source.parts[name] for name in only}
