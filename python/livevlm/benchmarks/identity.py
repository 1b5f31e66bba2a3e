# SPDX-License-Identifier: Apache-2.0
"""What makes answers comparable: everything that decides them, in one dictionary and its hash."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

import livevlm
from livevlm.errors import ConfigError

SEED = 0  # decoding is greedy; a judge's and torch's own random numbers start here
RUN_FILE = "run.json"


def config_hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def git_hash() -> str | None:
    """The commit of the source tree that livevlm runs from, "+" behind it if files have changed; None if installed."""
    folder = Path(livevlm.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else it is installed below some other repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device_of(model: torch.nn.Module) -> dict[str, str]:
    weight = next(model.parameters())
    name = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
    return {"device": name, "dtype": str(weight.dtype).removeprefix("torch."), "torch": torch.__version__}


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Writes what the folder's answers are of, or compares it with what is there.

    Raises:
        ConfigError: the folder holds answers of other settings, another model or another judge.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made: {error.strerror}") from None
    path = folder / RUN_FILE
    text = json.dumps(identity, indent=2) + "\n"
    try:
        with path.open("x") as file:
            file.write(text)
        return
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written to: {error.strerror}") from None
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError:
        if path.read_text() == text[: len(path.read_text())]:  # another rank is writing it, or was killed
            path.write_text(text)
            return
        raise ConfigError(f"{path} is damaged; delete it together with the answers beside it") from None
    found_flat, wanted_flat = _flat(found), _flat(json.loads(text))
    differs = [
        f"{name}: {found_flat.get(name)!r} there, {wanted_flat.get(name)!r} now"
        for name in sorted(found_flat.keys() | wanted_flat.keys())
        if found_flat.get(name) != wanted_flat.get(name)
    ]
    if differs:
        raise ConfigError(f"{folder} holds answers of another run ({'; '.join(differs)}); take another --out")


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat
