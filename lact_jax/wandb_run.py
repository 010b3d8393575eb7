"""Logging to Weights & Biases, when asked for.

mode      disabled (default; wandb is not even imported), offline (a folder under
          <workdir>/wandb, sent later by `wandb sync`) or online
the key   WANDB_API_KEY, or else a file api_keys.yaml in the working directory:  wandb: YOUR_KEY
the run   its id is kept in <workdir>/wandb_id.txt, so that a resumed run goes on in the same
          curves (wandb ignores the steps that it has already seen)
"""

import dataclasses
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lact_jax.run_protocol import NoRun, Run, by_element
from lact_jax.workdir import write_atomically

KEY_VARIABLE, ID_FILE = "WANDB_API_KEY", "wandb_id.txt"


@dataclasses.dataclass(frozen=True)
class WandbOptions:
    """Where to log. `name` None: the workdir's name; `entity` None: the key's default."""

    mode: str = "disabled"
    project: str = "lact_jax"
    entity: str | None = None
    name: str | None = None
    api_keys: str = "api_keys.yaml"


class WandbRun:
    """A run of the wandb package."""

    def __init__(self, package: Any, run: Any):
        self._package, self._run = package, run

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Records the values of one step; arrays as one curve an element ("name/0", …)."""
        self._run.log(by_element(values), step=step)

    def show(self, step: int, images: Mapping[str, Path], videos: Mapping[str, Path]) -> None:
        """Records pictures under their names, and all clips together as "videos"."""
        media = {name: self._package.Image(str(path)) for name, path in images.items()}
        clips = [
            self._package.Video(str(path), caption=caption, format="mp4")
            for caption, path in videos.items()
        ]
        self._run.log(media | ({"videos": clips} if clips else {}), step=step)

    def finish(self) -> None:
        """Sends or writes what is left and ends wandb's process."""
        self._run.finish()
        self._package.teardown()  # waits for the process: `finish` returns before the file is whole


def check(options: WandbOptions) -> None:
    """Raises ValueError for an unknown mode, and for online without a key."""
    if options.mode not in STARTERS:
        raise ValueError(f"wandb.mode is {options.mode!r}: choose from {', '.join(STARTERS)}")
    if options.mode == "online":
        api_key(options.api_keys)


def start_run(options: WandbOptions, workdir: str | Path, config: Mapping[str, Any]) -> Run:
    """Starts, or resumes under the same id, the run of a workdir.

    Args:
      config: nested dicts, shown with the run.

    Raises:
      ValueError: unknown mode; online without a key. Both before anything is started.
      ImportError: wandb is not installed.
    """
    check(options)
    return STARTERS[options.mode](options, Path(workdir), config)


def api_key(path: str | Path) -> str:
    """The key from the environment or the file. Raises ValueError saying where it can be put."""
    if os.environ.get(KEY_VARIABLE):
        return os.environ[KEY_VARIABLE]
    advice = (
        f"set {KEY_VARIABLE}, or put a line 'wandb: YOUR_KEY' in {Path(path).absolute()}, or "
        f"choose wandb.mode=offline"
    )
    if not Path(path).exists():
        raise ValueError(f"wandb.mode is online, but there is no API key: {advice}")
    try:
        keys = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as err:
        # The parser's message quotes the file, which may hold keys.
        raise ValueError(f"{path} is no YAML ({type(err).__name__}): {advice}") from None
    key = keys.get("wandb") if isinstance(keys, dict) else None
    if not isinstance(key, str) or not key:
        raise ValueError(f"{path} has no entry 'wandb': {advice}")
    return key


def _disabled(options: WandbOptions, workdir: Path, config: Mapping[str, Any]) -> Run:
    return NoRun()


def _offline(options: WandbOptions, workdir: Path, config: Mapping[str, Any]) -> Run:
    return _start(options, workdir, config, None)


def _online(options: WandbOptions, workdir: Path, config: Mapping[str, Any]) -> Run:
    return _start(options, workdir, config, api_key(options.api_keys))


STARTERS = {"disabled": _disabled, "offline": _offline, "online": _online}


def _start(
    options: WandbOptions, workdir: Path, config: Mapping[str, Any], key: str | None
) -> WandbRun:
    try:
        import wandb
    except ImportError as err:
        raise ImportError(
            f"wandb.mode is {options.mode}, but wandb can't be imported ({err}): "
            f"pip install wandb, or choose wandb.mode=disabled"
        ) from err
    try:
        run = wandb.init(
            mode=options.mode,
            project=options.project,
            entity=options.entity,
            name=options.name or workdir.absolute().name,
            id=_run_id(workdir / ID_FILE),
            resume="allow",
            dir=str(workdir),
            config=dict(config),
            settings=wandb.Settings(api_key=key),
        )
    except getattr(wandb, "Error", ()) as error:
        raise ValueError(
            f"wandb.mode={options.mode}: {str(error).rstrip('.')}. Check the key (WANDB_API_KEY or "
            f"{options.api_keys}), or log with --config.wandb.mode=offline"
        ) from error
    return WandbRun(wandb, run)


def _run_id(file: Path) -> str:
    if not file.exists():
        write_atomically(file, secrets.token_hex(4) + "\n")
    name = file.read_text().strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", name):
        raise ValueError(f"{file} holds no wandb run id ({name[:40]!r}): remove it for a new run")
    return name
