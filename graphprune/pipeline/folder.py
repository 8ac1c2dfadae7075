"""The run folder: who owns it, what it holds, which stages are done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from graphprune import __version__
from graphprune.errors import RunFolderError
from graphprune.files import remove, remove_temporaries, write_json

SCHEMA = "graphprune.run/2"
_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What the manifest says of a finished stage.

    Attributes:
        seconds: Wall time.
        peak_bytes: Largest resident memory of the process during it.
        note: What it found, in a few words.
        stamp: Of what it read; see `stamps`.
    """

    seconds: float
    peak_bytes: int
    note: str
    stamp: str


class RunFolder:
    """A locked run folder; get one from `open_run_folder`.

    Attributes:
        path: The folder.
        manifest: Content of run.json, written whole after every change.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def done(self, stage: str) -> StageRecord | None:
        """Return what is recorded of a stage, or None if it has not finished."""
        record = self.manifest["stages"].get(stage)
        return StageRecord(**record) if record else None

    def finish(self, stage: str, record: StageRecord) -> None:
        """Record that a stage has finished; its files must be in place."""
        stages = {**self.manifest["stages"]}
        stages[stage] = asdict(record)
        self.manifest["stages"] = stages
        self._write()

    def forget(self, stages: Iterable[str]) -> None:
        """Take stages off the record, so that they are done again."""
        gone = set(stages)
        self.manifest["stages"] = {
            name: row for name, row in self.manifest["stages"].items() if name not in gone
        }
        self._write()

    def remember(self, **values: Any) -> None:
        """Keep measured values for later stages and the report."""
        self.manifest["measured"] = {**self.manifest["measured"], **values}
        self._write()

    def measured(self, name: str) -> Any:
        """Return a value kept by `remember`."""
        return self.manifest["measured"][name]

    def _write(self) -> None:
        write_json(self.path / "run.json", self.manifest)


@contextmanager
def open_run_folder(path: Path, fingerprint: str, *, fresh: bool = False) -> Iterator[RunFolder]:
    """Open a run folder for one run and hold its lock.

    A folder of the same start is resumed. Nothing is touched if the folder belongs to something else.

    Args:
        path: The folder; made if it is not there.
        fingerprint: Of all that every stage reads.
        fresh: Whether to discard what an earlier run of graphprune left in it.

    Raises:
        RunFolderError: If another process holds it, or what it holds began otherwise.
    """
    manifest = _existing_manifest(path, fresh)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be made: {error.strerror}", "choose another folder with -o"
        ) from error
    lock = FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunFolderError(
            f"{path} is in use by another running graphprune", "wait for it, or choose another folder with -o"
        ) from None
    try:
        if manifest and manifest["fingerprint"] != fingerprint and not fresh:
            raise RunFolderError(
                f"{path} holds a run of another recipe (its data, seed or prune section), model or text",
                "choose another folder with -o, or discard that run with --fresh",
            )
        if manifest is None or fresh:
            _discard(path)
            manifest = _new_manifest(fingerprint)
        remove_temporaries(path)
        folder = RunFolder(path, manifest)
        folder._write()
        yield folder
    finally:
        lock.release()


def _existing_manifest(path: Path, fresh: bool) -> dict[str, Any] | None:
    if not path.exists():
        return None
    if not path.is_dir():
        raise RunFolderError(f"{path} is a file", "choose a folder with -o")
    if not (path / "run.json").is_file():
        if any(item.name != _LOCK for item in path.iterdir()):
            raise RunFolderError(
                f"{path} holds files that are not a graphprune run", "choose an empty or new folder with -o"
            )
        return None
    try:
        manifest: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"schema {manifest['schema']}")
        manifest["stages"], manifest["measured"], manifest["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if fresh:
            return None
        raise RunFolderError(
            f"{path}/run.json is not a manifest of this version: {error}",
            "choose another folder with -o, or discard that run with --fresh",
        ) from error
    return manifest


def _new_manifest(fingerprint: str) -> dict[str, Any]:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "schema": SCHEMA,
        "graphprune_version": __version__,
        "created": created,
        "fingerprint": fingerprint,
        "stages": {},
        "measured": {},
    }


def _discard(path: Path) -> None:
    for item in path.iterdir():
        if item.name != _LOCK:
            remove(item)
