"""A whole run: every stage in order, those that are done already skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphprune.errors import RecipeError, RunFolderError, TrainingError
from graphprune.files import remove, write_text
from graphprune.pipeline import stages
from graphprune.pipeline.folder import RunFolder, StageRecord, open_run_folder
from graphprune.pipeline.inputs import Inputs, open_inputs
from graphprune.pipeline.measure import Stopwatch
from graphprune.pipeline.onnx_inputs import open_onnx_inputs
from graphprune.pipeline.onnx_session import OnnxRun
from graphprune.pipeline.onnx_stages import ONNX_OUTPUTS, ONNX_STAGES
from graphprune.pipeline.onnx_summary import onnx_report_stage
from graphprune.pipeline.progress import Reporter
from graphprune.pipeline.quantize import quantize_stage
from graphprune.pipeline.session import Session
from graphprune.pipeline.stamps import stage_stamps
from graphprune.pipeline.summary import report_stage
from graphprune.recipe import Recipe
from graphprune.recipe_file import dump_recipe, load_recipe
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

_PROCESSES = "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"
"""Where torchrun, accelerate and MPI say how many processes there are."""

STAGES: dict[str, Callable[[Session], str]] = {
    "trace": stages.trace_stage,
    "certify": stages.certify_stage,
    "evaluate": stages.dense_stage,
    "prune": stages.prune_stage,
    "reload": stages.reload_stage,
    "quantize": quantize_stage,
    "recover": stages.recover_stage,
    "export": stages.export_stage,
    "speed": stages.speed_stage,
}

AnySession = Session | OnnxRun


def run(
    recipe_path: Path | None,
    output: Path,
    reporter: Reporter,
    *,
    model: str | None = None,
    train: str | None = None,
    evaluate: str | None = None,
    fresh: bool = False,
    command: str = "graphprune run",
) -> Report:
    """Run a recipe.

    Args:
        recipe_path: The YAML file; None for an ONNX file of which all settings are left at their defaults.
        output: The run folder; a run in it that began with the same model, text and pruning is resumed.
        reporter: Whom to tell.
        model: Replaces the recipe's model.
        train: Replaces the recipe's text to learn from.
        evaluate: Replaces its text to judge by.
        fresh: Whether to discard an earlier run in `output`.
        command: For the report: how to do it again.

    Returns:
        The report, which is also in the folder.

    Raises:
        GraphPruneError: With what is wrong and what to do. Bad input is found before the folder is touched.
    """
    replaced = {"model.id": model, "data.train": train, "data.evaluate": evaluate}
    with _opened(recipe_path, output, reporter, replaced, fresh) as session:
        order = stage_order(session.recipe)
        reused = _do_all(session, order)
        if isinstance(session, OnnxRun):
            onnx_report_stage(session, order, reused, command)
        else:
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
        output: The run folder; a run in it that began with the same model, text and pruning is resumed.
        reporter: Whom to tell.
        model: Replaces the recipe's model.
        fresh: Whether to discard an earlier run in `output`.

    Returns:
        What has been measured, by the manifest's names.

    Raises:
        GraphPruneError: With what is wrong and what to do. Bad input is found before the folder is touched.
    """
    if load_recipe(recipe_path, {"model.id": model} if model else None).model.is_onnx:
        raise RecipeError(
            f"there is no stage '{last}' for an ONNX file, which is pruned and quantized at once",
            "use graphprune run; the pruned float model is in the run folder's model/",
        )
    with _opened(recipe_path, output, reporter, {"model.id": model}, fresh) as session:
        order = stage_order(session.recipe)
        _do_all(session, order[: order.index(last) + 1])
        return {**session.folder.manifest["measured"]}


def stage_order(recipe: Recipe) -> list[str]:
    """Return the names of the stages in the order in which a recipe has them done."""
    order = list(_stages(recipe))
    if not recipe.model.is_onnx and recipe.recover.base == "pruned":
        order.remove("recover")
        order.insert(order.index("quantize"), "recover")
    return order


def _stages(recipe: Recipe) -> Mapping[str, Callable[[Any], str]]:
    return ONNX_STAGES if recipe.model.is_onnx else STAGES


@contextmanager
def _opened(
    recipe_path: Path | None,
    output: Path,
    reporter: Reporter,
    replaced: Mapping[str, str | None],
    fresh: bool,
) -> Iterator[AnySession]:
    _check_alone()
    recipe = load_recipe(recipe_path, {key: value for key, value in replaced.items() if value is not None})
    reporter.say(f"recipe {recipe_path or 'of defaults'}, model {recipe.model.id}, into {output}")
    base = recipe_path.resolve().parent if recipe_path is not None else Path.cwd()
    inputs = open_onnx_inputs(recipe, base) if recipe.model.is_onnx else open_inputs(recipe, base)
    with open_run_folder(output, inputs.fingerprint, fresh=fresh) as folder:
        if recipe_path is not None:
            write_text(folder / "recipe.input.yaml", recipe_path.read_text(encoding="utf-8"))
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        folder.remember(recipe_folder=str(base))
        with reporter.logging_to(folder / "log.txt"):
            session: AnySession = (
                Session(inputs, folder, reporter)
                if isinstance(inputs, Inputs)
                else OnnxRun(inputs, folder, reporter)
            )
            _forget_changed(session)
            _forget_lost(folder, recipe)
            yield session


def _check_alone() -> None:
    """Refuse to be one of several processes: each would do the whole run, and in one folder."""
    for name in _PROCESSES:
        count = os.environ.get(name, "1")
        if count != "1":
            raise TrainingError(
                f"a recipe is run by one process, and this is one of {count} ({name})",
                "start graphprune itself, without accelerate launch or torchrun; what several processes can share is "
                "a training loop of your own, with LHSPG as its optimizer",
            )


def _do_all(session: AnySession, names: list[str]) -> list[str]:
    """Do those of the stages that are not done yet; return the others."""
    folder = session.folder
    reused = [name for name in names if folder.done(name)]
    for name in names:
        _do(name, _stages(session.recipe)[name], session)
    missing = [name for name in names if not folder.done(name)]
    if missing:
        raise RunFolderError(f"stages were left out: {', '.join(missing)}", "run again")
    return reused


def _outputs(recipe: Recipe, name: str) -> tuple[str, ...]:
    outputs = OUTPUTS_ON_PRUNED if recipe.recover.base == "pruned" else OUTPUTS
    return (ONNX_OUTPUTS if recipe.model.is_onnx else outputs).get(name, ())


def _forget_lost(folder: RunFolder, recipe: Recipe) -> None:
    """Forget the stages from the first one on whose files are no longer there."""
    names = stage_order(recipe)
    for position, name in enumerate(names):
        if folder.done(name) and not all((folder / path).is_file() for path in _outputs(recipe, name)):
            folder.forget(_with_rewritten(names[position:], recipe))
            return


def _forget_changed(session: AnySession) -> None:
    """Forget the stages that read something else now than they did, and remove what they left."""
    folder, stamps = session.folder, _stamps(session)
    changed = [name for name in stamps if (record := folder.done(name)) and record.stamp != stamps[name]]
    if not changed:
        return
    changed = _with_rewritten(changed, session.recipe)
    folder.forget(changed)
    for name in changed:
        for path in (*OUTPUTS.get(name, ()), *OUTPUTS_ON_PRUNED.get(name, ())):
            remove(folder / Path(path).parts[0])
    for path in ("report.html", "report.json"):
        remove(folder / path)
    session.reporter.say(f"the recipe has changed for {', '.join(changed)}: done again")


def _stamps(session: AnySession) -> dict[str, str]:
    inputs = session.inputs
    return stage_stamps(session.recipe, inputs.fingerprint, inputs.sections, stage_order(session.recipe))


def _with_rewritten(names: list[str], recipe: Recipe) -> list[str]:
    """Return the names of stages, and of those whose files one of these has written over."""
    again = {*names, "quantize"} if "recover" in names and recipe.recover.base == "quantized" else {*names}
    return [name for name in stage_order(recipe) if name in again]


def _do(name: str, stage: Callable[[Any], str], session: AnySession) -> None:
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
    folder.finish(name, StageRecord(watch.seconds, watch.peak_bytes, note, _stamps(session)[name]))
    session.reporter.say(f"{name:9} {watch.seconds:6.1f} s, {watch.peak_bytes / 1e9:.1f} GB: {note}")
