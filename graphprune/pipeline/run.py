"""A whole run: every stage in order, those that are done already skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphprune.errors import RunFolderError
from graphprune.files import write_text
from graphprune.pipeline import stages
from graphprune.pipeline.folder import RunFolder, StageRecord, open_run_folder
from graphprune.pipeline.inputs import open_inputs
from graphprune.pipeline.measure import Stopwatch
from graphprune.pipeline.progress import Reporter
from graphprune.pipeline.session import Session
from graphprune.pipeline.summary import report_stage
from graphprune.recipe import Recipe, dump_recipe, load_recipe
from graphprune.report.group_files import GROUP_FILES
from graphprune.report.schema import Report, read_report

# What a later stage or the user reads: a stage whose files are gone is done again.
OUTPUTS = {
    "trace": tuple(f"graph/{name}" for name in GROUP_FILES),
    "certify": ("graph/certificate.json",),
    "prune": ("plan.json", "training/metrics.jsonl", "model/config.json", "model/model.safetensors"),
    "quantize": ("quant/quant.json", "quant/quant.safetensors"),
    "recover": ("quant/quant.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    "export": ("onnx/model.onnx", "onnx/model.onnx.data", "onnx/genai_config.json"),
}
# Where adapters are trained on the float model, they are merged, and it is quantization that leaves adapters.
OUTPUTS_ON_PRUNED = {
    **OUTPUTS,
    "recover": ("recovered/config.json", "recovered/model.safetensors"),
    "quantize": OUTPUTS["recover"] + OUTPUTS["quantize"][1:],
}

STAGES: dict[str, Callable[[Session], str]] = {
    "evaluate": stages.dense_stage,
    "trace": stages.trace_stage,
    "certify": stages.certify_stage,
    "prune": stages.prune_stage,
    "reload": stages.reload_stage,
    "quantize": stages.quantize_stage,
    "recover": stages.recover_stage,
    "export": stages.export_stage,
    "speed": stages.speed_stage,
}


def run(
    recipe_path: Path,
    output: Path,
    reporter: Reporter,
    *,
    model: str | None = None,
    fresh: bool = False,
    command: str = "graphprune run",
) -> Report:
    """Run a recipe.

    Args:
        recipe_path: The YAML file.
        output: The run folder; a run of the same recipe and inputs in it is resumed.
        reporter: Whom to tell.
        model: Replaces the recipe's model.
        fresh: Whether to discard an earlier run in `output`.
        command: For the report: how to do it again.

    Returns:
        The report, which is also in the folder.

    Raises:
        GraphPruneError: With what is wrong and what to do. Bad input is found before the folder is touched.
    """
    with _opened(recipe_path, output, reporter, model, fresh) as session:
        order = stage_order(session.recipe)
        reused = _do_all(session, order)
        report_stage(session, order, reused, command)
    return read_report(output / "report.json")


def run_until(
    last: str,
    recipe_path: Path,
    output: Path,
    reporter: Reporter,
    *,
    model: str | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run a recipe up to a stage; `run` on the same folder goes on from there.

    Args:
        last: Name of the stage.
        recipe_path: The YAML file.
        output: The run folder; a run of the same recipe and inputs in it is resumed.
        reporter: Whom to tell.
        model: Replaces the recipe's model.
        fresh: Whether to discard an earlier run in `output`.

    Returns:
        What has been measured, by the manifest's names.

    Raises:
        GraphPruneError: With what is wrong and what to do. Bad input is found before the folder is touched.
    """
    with _opened(recipe_path, output, reporter, model, fresh) as session:
        order = stage_order(session.recipe)
        _do_all(session, order[: order.index(last) + 1])
        return {**session.folder.manifest["measured"]}


def stage_order(recipe: Recipe) -> list[str]:
    """Return the names of the stages in the order in which a recipe has them done."""
    order = list(STAGES)
    if recipe.recover.base == "pruned":
        order.remove("recover")
        order.insert(order.index("quantize"), "recover")
    return order


@contextmanager
def _opened(
    recipe_path: Path, output: Path, reporter: Reporter, model: str | None, fresh: bool
) -> Iterator[Session]:
    recipe = load_recipe(recipe_path, {"model.id": model} if model else None)
    reporter.say(f"recipe {recipe_path}, model {recipe.model.id}, into {output}")
    inputs = open_inputs(recipe, recipe_path.resolve().parent)
    with open_run_folder(output, inputs.fingerprint, fresh=fresh) as folder:
        write_text(folder / "recipe.input.yaml", recipe_path.read_text(encoding="utf-8"))
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        folder.remember(recipe_folder=str(recipe_path.resolve().parent))
        with reporter.logging_to(folder / "log.txt"):
            _forget_lost(folder, recipe)
            yield Session(inputs, folder, reporter)


def _do_all(session: Session, names: list[str]) -> list[str]:
    """Do those of the stages that are not done yet; return the others."""
    folder = session.folder
    reused = [name for name in names if folder.done(name)]
    for name in names:
        _do(name, STAGES[name], session)
    missing = [name for name in names if not folder.done(name)]
    if missing:
        raise RunFolderError(f"stages were left out: {', '.join(missing)}", "run again")
    return reused


def _outputs(recipe: Recipe, name: str) -> tuple[str, ...]:
    outputs = OUTPUTS_ON_PRUNED if recipe.recover.base == "pruned" else OUTPUTS
    return outputs.get(name, ())


def _forget_lost(folder: RunFolder, recipe: Recipe) -> None:
    """Forget the stages from the first one on whose files are no longer there."""
    names = stage_order(recipe)
    for position, name in enumerate(names):
        if folder.done(name) and not all((folder / path).is_file() for path in _outputs(recipe, name)):
            folder.forget(names[position:])
            return


def _do(name: str, stage: Callable[[Session], str], session: Session) -> None:
    folder: RunFolder = session.folder
    record = folder.done(name)
    if record:
        session.reporter.say(f"{name:9} already done: {record.note}")
        return
    with Stopwatch() as watch:
        note = stage(session)
    missing = [path for path in _outputs(session.recipe, name) if not (folder / path).is_file()]
    if missing:
        raise RunFolderError(f"stage '{name}' did not write {', '.join(missing)}", "please report it")
    folder.finish(name, StageRecord(watch.seconds, watch.peak_bytes, note))
    session.reporter.say(f"{name:9} {watch.seconds:6.1f} s, {watch.peak_bytes / 1e9:.1f} GB: {note}")
