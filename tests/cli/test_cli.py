from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "demo.yaml"


def graphprune(*arguments, check=False):
    return subprocess.run(
        [sys.executable, "-m", "graphprune", *arguments],
        capture_output=True,
        text=True,
        check=check,
        timeout=300,
    )


@pytest.mark.parametrize("statement", ["import graphprune", "import graphprune.cli"])
def test_importing_loads_nothing_heavy(statement):
    heavy = "{'torch', 'transformers', 'peft', 'onnx', 'matplotlib'}"
    code = f"{statement}; import sys; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_help_names_the_command_and_its_options():
    text = graphprune("--help", check=True).stdout
    assert all(command in text for command in ("inspect", "prune", "recover", "run"))
    for command, option in (("eval", "--tasks"), ("chat", "--temperature"), ("verify", "--text")):
        assert option in graphprune(command, "--help", check=True).stdout
    for command in ("prune", "recover", "run"):
        text = graphprune(command, "--help", check=True).stdout
        assert all(option in text for option in ("--output", "--model", "--fresh", "--quiet"))
    assert all(
        option in graphprune("run", "--help", check=True).stdout for option in ("--train", "--evaluate")
    )


def test_public_names_are_callable_in_whatever_order_they_are_imported():
    code = """
import graphprune as gp
import graphprune.trace.fx, graphprune.shrink.model as model, graphprune.certify.certificate
from graphprune.trace.model import trace
import torch
torch.manual_seed(0)
layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).eval()
inputs = {"input": torch.randn(5, 3)}
groups = gp.node_groups(gp.trace(layers, inputs))
name = next(name for name in groups if groups[name].prunable)
assert gp.certify(layers, groups, inputs).ok
small = gp.shrink(layers, groups, gp.Plan({name: [1]}), inputs)
assert small[0].weight.shape == (3, 3)
assert all(callable(getattr(gp, name)) for name in gp.__all__)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_name_that_is_not_public_is_an_attribute_error():
    import graphprune as gp

    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        gp.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "none.yaml", "-o", "RUN"), 2, "cannot read the recipe none.yaml"),
        (("prune", "none.yaml", "-o", "RUN"), 2, "cannot read the recipe none.yaml"),
        (("recover", "none.yaml", "-o", "RUN"), 2, "cannot read the recipe none.yaml"),
        (("recover", "none.yaml"), 2, "Missing option '-o'"),
        (("eval", "none"), 2, "there is no ONNX model at none"),
        (("chat", "none"), 2, "there is no ONNX model at none"),
        (("verify", "none"), 2, "there is no ONNX model at none"),
        (("run", "-o", "RUN"), 2, "Missing argument"),
        (("run",), 2, "Missing option '-o'"),
        (("run", "-o", "RUN", "--model", "demo"), 2, "without a recipe only a .onnx file can be run"),
        (("run", "-o", "RUN", "--model", "none.onnx"), 2, "there is no model 'none.onnx'"),
        (("rnu",), 2, "No such command"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = graphprune(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["--model", "none.onnx"], "there is no model 'none.onnx'"),
        ([str(RECIPE), "--model", "./none"], "there is no model './none'"),
        ([str(RECIPE), "--model", "none"], "there is no model 'none'"),
        ([str(RECIPE), "--train", "none.txt"], "there is no text 'none.txt'"),
        ([str(RECIPE), "--evaluate", "none"], "there is no text 'none'"),
    ],
)
def test_what_is_not_there_is_told_before_torch_is_imported(arguments, missing, tmp_path):
    code = f"""
import sys
from graphprune.cli import app
from graphprune.errors import GraphPruneError
try:
    app(["run", *{arguments!r}, "-o", "RUN"])
except GraphPruneError as error:
    assert {missing!r} in str(error)
    sys.exit(100 if "torch" in sys.modules else 42)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == 42
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_key_is_reported_with_its_line(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("graphprune: 1\ndata: {train: a.txt, evaluate: b.txt}\nprune: {remvoe: 0.3}\n")
    done = graphprune("run", str(recipe), "-o", str(tmp_path / "RUN"))
    assert done.returncode == 2
    assert "r.yaml:3: unknown key 'prune.remvoe'" in done.stderr
    assert not (tmp_path / "RUN").exists()
