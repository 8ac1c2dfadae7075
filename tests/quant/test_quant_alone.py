"""quant stands alone: importing it loads nothing of its users, and its README runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import quant

FOREIGN = (
    "graphprune", "transformers", "peft", "onnx", "onnxruntime", "networkx", "pydantic", "safetensors", "bitsandbytes"
)  # fmt: skip


def run(code: str, folder: Path) -> str:
    root = str(Path(quant.__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_importing_it_loads_none_of_its_users(tmp_path: Path) -> None:
    loaded = run("import quant, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))", tmp_path)
    assert "quant" in loaded.split()
    assert set(FOREIGN).isdisjoint(loaded.split())


def test_every_public_name_is_there_and_documented() -> None:
    assert quant.__all__ == sorted(quant.__all__)
    assert all(getattr(quant, name).__doc__ for name in quant.__all__)


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    readme = (Path(quant.__file__).parent / "README.md").read_text(encoding="utf-8")
    for example in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL):
        run(example, tmp_path)
    assert (tmp_path / "packed" / "quant.json").is_file()
