"""What a run has done so far, in a folder beside its result, so that another run can go on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.errors import QuantError
from quant.files import replace_file
from quant.stream.layers import Layer
from quant.stream.part import Part, read_part

WORK_FOLDER, JOB_FILE, RESULT_FOLDER = ".work", "job.json", "result"
DONE_FILE, SCHEMA = "stream.json", "graphprune.stream/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run over a checkpoint: what it does, to what, and where it keeps it.

    Attributes:
        output: Folder of the result.
        identity: Settings and source, as JSON values: runs that have them in common are the same job.
        layers: All layers; a layer's place here is the name of its part.
    """

    output: Path
    identity: dict[str, Any]
    layers: list[Layer]

    @property
    def work(self) -> Path:
        """The folder that is there only until the result is."""
        return self.output / WORK_FOLDER

    @property
    def parts(self) -> Path:
        """The folder of the parts: of this job alone, so that what another left is never taken for its own."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return self.work / f"parts-{digest[:16]}"

    def part_path(self, place: int) -> Path:
        """Return where the part of the layer at this place lies once it is finished."""
        return self.parts / f"{place:06d}.safetensors"

    def part(self, place: int) -> Part | None:
        """Return the finished part of the layer at this place, or None."""
        return read_part(self.part_path(place), self.layers[place])

    def parts_written(self) -> int:
        """Return how many part files there are."""
        return len(list(self.parts.glob("[0-9]*.safetensors")))

    def begin(self) -> None:
        """Make the work folder, or take up the one of an earlier run of the same job.

        Raises:
            QuantError: The folder cannot be made, or it holds parts of another job that is not finished.
        """
        path = self.work / JOB_FILE
        earlier = _read_json(path)
        # Without its job file a folder is one that `end` was removing when it was stopped.
        other = earlier not in ({}, self.identity) and any(self.work.glob("parts-*/*.safetensors"))
        if other and replace(self, identity=earlier).finished() is None:
            raise QuantError(
                f"{self.work} was begun with {_difference(earlier, self.identity)}",
                "run again with the same settings and source, or delete that folder to begin anew",
            )
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QuantError(
                f"{self.parts} cannot be made: {error}", "choose another output folder"
            ) from error
        if earlier != self.identity:
            replace_file(path, lambda temporary: temporary.write_text(json.dumps(self.identity), "utf-8"))

    def finished(self) -> dict[str, Any] | None:
        """Return what `DONE_FILE` says if the output is that of this job and whole, else None."""
        done = _read_json(self.output / DONE_FILE)
        if done.get("schema") != SCHEMA or done.get("job") != self.identity:
            return None
        sizes = {self.output / name: size for name, size in done["files"].items()}
        whole = all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
        return done if whole else None

    def end(self) -> None:
        """Remove the work folder, unless another job is at work in it."""
        if _read_json(self.work / JOB_FILE) in ({}, self.identity):
            shutil.rmtree(self.work, ignore_errors=True)


def written_before(output: Path) -> list[str]:
    """Return the names of the files that an earlier run wrote to this folder."""
    return list(_read_json(output / DONE_FILE).get("files", {}))


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where there is none that can be read."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _difference(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """Say in words what two jobs differ in."""
    before, after = earlier.get("config", {}), now["config"]
    changed = [
        f"{key} {before.get(key)!r} instead of {after[key]!r}"
        for key in after
        if before.get(key) != after[key]
    ]
    if earlier.get("source") != now["source"]:
        changed.append("other source files (their sizes, headers or times differ)")
    return ", ".join(changed)
