"""The stages of a run on an ONNX file. Each leaves its result in the run folder, whole, and says a few words of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from graphprune.certify.certificate import certify
from graphprune.certify.onnx_session import Arrays, OnnxSession
from graphprune.errors import QuantizationError, VerificationError
from graphprune.export.agreement import measure_agreement
from graphprune.export.check import raise_if_failed
from graphprune.export.filenames import DATA_FILE, FILE
from graphprune.export.quantize_onnx import QuantizedOnnx, quantize_onnx
from graphprune.export.runtime import OnnxDecoder
from graphprune.export.simplify import forget_traces
from graphprune.export.verify_quantized import distance, measure_packed, with_weights
from graphprune.files import remove, replacing, size_of, write_json
from graphprune.pipeline.onnx_genai import write_companions
from graphprune.pipeline.onnx_session import OnnxRun
from graphprune.prune.budget import Budget, targets
from graphprune.prune.one_shot_budget import one_shot_budget
from graphprune.prune.onnx import prune_onnx
from graphprune.recipe import Recipe
from graphprune.report.group_document import group_document
from graphprune.report.group_files import GROUP_FILES, write_groups
from graphprune.shrink.plan import Plan
from graphprune.trace.onnx_reading import read_onnx

# The packed model may be worse than the float model on the same weights by this factor, no more.
PERPLEXITY_FACTOR = 1.05
PRUNED = f"model/{FILE}"
EXPORTED = f"onnx/{FILE}"
_SMALLEST_EXTERNAL = 1024
_CALLS = 5

ONNX_OUTPUTS = {
    "trace": tuple(f"graph/{name}" for name in GROUP_FILES),
    "certify": ("graph/certificate.json",),
    "prune": ("plan.json", PRUNED),
    "export": (EXPORTED,),
}


def trace_stage(session: OnnxRun) -> str:
    """Trace the file, write its node groups, and see whether the share that is asked for can go."""
    with session.reporter.task("coupling analysis"):
        groups = session.groups
    write_groups(group_document(groups, session.inputs.file.name), session.path("graph"))
    names = [group.name for group in targets(groups, session.kinds)]
    budget = _allotted(session, {name: torch.ones(groups[name].size) for name in names})
    session.folder.remember(parameters=int(budget.before))
    prunable = sum(group.prunable for group in groups.values())
    return f"{len(groups.graph.operators)} operators, {len(groups)} node groups, {prunable} prunable"


def certify_stage(session: OnnxRun) -> str:
    """Prove on the file's own weights that the groups are right."""
    example = session.example(session.source)
    certificate = certify(None, session.groups, example, seed=session.recipe.seed)
    certificate.raise_if_failed()
    write_json(session.path("graph/certificate.json"), certificate.row())
    return (
        f"{certificate.groups} groups permuted at once: {certificate.permuted_max_error:.1e}; "
        f"removed against zeroed: {certificate.removed_max_error:.1e}"
    )


def dense_stage(session: OnnxRun) -> str:
    """Measure a decoder as it came; of any other file, see that it runs."""
    if not session.inputs.is_decoder:
        outputs = _outputs(session.source, session.judging(session.source), session)
        if not all(bool(np.isfinite(array).all()) for array in outputs):
            raise VerificationError(
                f"outputs of {session.inputs.file} are not finite",
                "check the file, or give inputs it is made for",
            )
        return f"{len(outputs)} outputs, all finite"
    value = session.judge(session.inputs.file, "as it came")
    session.folder.remember(perplexity_dense=value, written_dense=_written(session, session.inputs.file))
    return f"perplexity {value:.2f}"


def prune_stage(session: OnnxRun) -> str:
    """Score, cut and repair in one shot, and save the smaller float model."""
    settings, groups = session.recipe.prune, session.groups
    with session.reporter.task(f"{settings.saliency} on {len(session.calibration)} batches"):
        pruned = prune_onnx(
            None,
            groups,
            session.calibration,
            remove=settings.remove,
            saliency=settings.saliency,
            kinds=session.kinds,
            repair=settings.repair == "least_squares",
            layout=settings.layout,
            width_multiple=settings.width_multiple,
            keep_at_least=settings.keep_at_least,
        )
    budget = pruned.budget
    with replacing(session.path("model")) as temporary:
        save_onnx(pruned.model, temporary)
    pruned.plan.save(
        session.path("plan.json"), asked=budget.asked, achieved=budget.removed_share, budget=budget.unit
    )
    file = session.path(PRUNED)
    if session.inputs.is_decoder:
        value = session.judge(file, "pruned")
        session.folder.remember(perplexity_pruned=value)
        told = f"perplexity {value:.2f}"
    else:
        moved = _moved(session, read_onnx(file))
        session.folder.remember(distance_pruned=moved)
        told = f"outputs moved by {moved:.1%}"
    session.folder.remember(parameters_after=int(budget.after), widths=_widths(session, budget))
    return (
        f"{budget.removed_share:.1%} of {budget.before / 1e6:.1f} M parameters removed "
        f"(asked {budget.asked:.0%}); {told}"
    )


def export_stage(session: OnnxRun) -> str:
    """Quantize the pruned model, write it, and give it its final name only once it is verified."""
    unverified, float_file = session.path("onnx.unverified"), session.path(PRUNED)
    remove(unverified)
    pruned = read_onnx(float_file)
    with session.reporter.task("quantization"):
        quantized = quantized_by(session.recipe, pruned)
    forget_traces(quantized.model)
    quantized.model.metadata_props.update(_metadata(session))
    save_onnx(quantized.model, unverified)
    write_companions(session.inputs.file.parent, unverified, session.inputs.tokenizer)
    with session.reporter.task("verification against the float model"):
        checks = measure_packed(unverified / FILE, pruned, quantized, session.verifying(pruned))
        raise_if_failed(str(unverified / FILE), checks)
    told = _judge_decoder(session, pruned, quantized, unverified / FILE) if session.inputs.is_decoder else {}
    if not session.inputs.is_decoder:
        session.folder.remember(distance_onnx=_moved(session, read_onnx(unverified / FILE)))
    with replacing(session.path("onnx")) as temporary:
        unverified.rename(temporary)
    session.folder.remember(
        verification={"checks": [[c.name, c.measured, c.bound] for c in checks], **told},
        layers=_layers(quantized),
        left=dict(quantized.left),
    )
    size = onnx_bytes(session.path(EXPORTED))
    left = f", {len(quantized.left)} left in float" if quantized.left else ""
    end = (
        f"perplexity {told['perplexity']:.2f}"
        if told
        else f"outputs moved by {_of(session, 'distance_onnx'):.1%}"
    )
    return f"{len(quantized.packed)} weights packed{left}; {size / 1e6:.1f} MB; {end}"


def speed_stage(session: OnnxRun) -> str:
    """Measure how fast the file is beside the source, and let a decoder write."""
    source, compact = session.inputs.file, session.path(EXPORTED)
    decodes = session.inputs.is_decoder and OnnxDecoder(compact).has_cache
    evaluate, tokens = session.inputs.evaluate if decodes else None, session.recipe.report.speed_tokens
    if evaluate is not None:
        session.folder.remember(written_compact=_written(session, compact))
    if not tokens:
        return "not asked for"
    if evaluate is None:
        seconds = [_seconds(read_onnx(file), session) for file in (source, compact)]
        return f"{1000 * seconds[1]:.1f} ms a call, as it came {1000 * seconds[0]:.1f}"
    prompt = evaluate.ids[0, :16].tolist()
    decoders = [OnnxDecoder(source), OnnxDecoder(compact)]
    speeds = [decoder.decode_speed(prompt, tokens) for decoder in decoders * 2]
    dense, small = max(speeds[0::2]), max(speeds[1::2])
    session.folder.remember(speed_dense=dense, speed_compact=small)
    return f"{small:.1f} tokens/s, as it came {dense:.1f}"


ONNX_STAGES: dict[str, Callable[[OnnxRun], str]] = {
    "trace": trace_stage,
    "certify": certify_stage,
    "evaluate": dense_stage,
    "prune": prune_stage,
    "export": export_stage,
    "speed": speed_stage,
}


def quantized_by(recipe: Recipe, model: ir.Model) -> QuantizedOnnx:
    """Return a float model with its matrices packed as a recipe says.

    Raises:
        QuantizationError: If it has no matrix that could be.
    """
    settings = recipe.quantize
    quantized = quantize_onnx(
        model,
        format=settings.format,
        block_size=settings.block_size,
        scale_storage=settings.scale_storage,
        embedding_format=settings.embedding,
        exclude=settings.exclude,
        profile=recipe.export.profile,
        exact=recipe.export.weights == "exact",
    )
    if not quantized.packed:
        reasons = dict.fromkeys(quantized.left.values())
        raise QuantizationError(
            f"none of {len(quantized.left)} weights can be packed: {'; '.join(list(reasons)[:3]) or 'there are none'}",
            "exclude fewer of them, or take the float model from the run folder's model/",
        )
    return quantized


def save_onnx(model: ir.Model, folder: Path) -> None:
    """Write a model into a new folder, larger weights beside it."""
    folder.mkdir()
    ir.save(model, folder / FILE, external_data=DATA_FILE, size_threshold_bytes=_SMALLEST_EXTERNAL)


def onnx_bytes(file: Path) -> int:
    """Return the bytes of an ONNX file and of the files that its weights lie in."""
    held = {
        Path(tensor.path)
        for value in read_onnx(file).graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    return size_of(file) + sum(size_of(path) for path in held)


def _allotted(session: OnnxRun, scores: dict[str, torch.Tensor]) -> Budget:
    settings = session.recipe.prune
    return one_shot_budget(
        session.groups,
        scores,
        settings.remove,
        settings.saliency,
        layout=settings.layout,
        width_multiple=settings.width_multiple,
        keep_at_least=settings.keep_at_least,
    )


def _widths(session: OnnxRun, budget: Budget) -> list[dict[str, Any]]:
    groups = session.groups
    kinds = {groups[name].kind for name in budget.removed_units}
    return [
        {
            "name": name,
            "kind": group.kind,
            "before": group.size,
            "after": group.size - budget.removed_units.get(name, 0),
        }
        for name, group in groups.items()  # those that stay whole too: the picture counts layers
        if group.kind in kinds
    ]


def _outputs(model: ir.Model, batches: Sequence[Arrays], session: OnnxRun) -> list[Any]:
    """Return all outputs but caches, whose sizes change."""
    states = session.groups.graph.state_names
    names = [str(value.name) for value in model.graph.outputs if value.name not in states]
    runner = OnnxSession(model)
    return [array for batch in batches for array in runner.run(batch, names)]


def _moved(session: OnnxRun, model: ir.Model) -> float:
    """Return how far a model's outputs are from the source's."""
    expected = _outputs(session.source, session.judging(session.source), session)
    return distance(_outputs(model, session.judging(model), session), expected)


def _judge_decoder(
    session: OnnxRun, pruned: ir.Model, quantized: QuantizedOnnx, file: Path
) -> dict[str, Any]:
    """Compare a packed decoder with the float model on the quantizer's weights, as both are."""
    with session.scratch("reference") as folder:
        ir.save(with_weights(pruned, quantized), folder / FILE, external_data=DATA_FILE)
        texts = [row["input_ids"] for row in session.verifying(pruned)[:-1]]
        found = measure_agreement(OnnxDecoder(file).logits, OnnxDecoder(folder / FILE).logits, texts)
        reference = session.judge(folder / FILE, "quantized, in float")
    raise_if_failed(str(file), found.checks)
    value = session.judge(file, "ONNX")
    session.folder.remember(perplexity_quantized=reference, perplexity_onnx=value)
    if value > PERPLEXITY_FACTOR * reference:
        raise VerificationError(
            f"the ONNX model's perplexity is {value:.2f}, that of the float model on its weights {reference:.2f}",
            f"set export.weights to exact (recipe: export.weights); the files are in {file.parent}",
        )
    return {**found.row(), "perplexity": value}


def _layers(quantized: QuantizedOnnx) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "format": weight.quantized.format,
            "shape": list(weight.quantized.shape),
            "error_before": weight.error,
            "error_after": weight.error,
        }
        for name, weight in quantized.packed.items()
    ]


def _metadata(session: OnnxRun) -> dict[str, str]:
    plan = Plan.load(session.path("plan.json"))
    return {
        "graphprune.plan": json.dumps({name: list(units) for name, units in plan.items()}),
        "graphprune.source": session.inputs.file.name,
    }


def _written(session: OnnxRun, file: Path) -> list[str]:
    decoder = OnnxDecoder(file)
    prompts = session.recipe.report.prompts if decoder.has_cache else ()
    return [session.write(decoder, prompt) for prompt in prompts]


def _seconds(model: ir.Model, session: OnnxRun) -> float:
    """Return the median wall time of a call, on random inputs."""
    runner, example, names = (
        OnnxSession(model),
        session.example(model),
        [str(v.name) for v in model.graph.outputs],
    )
    runner.run(example, names)
    seconds = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        runner.run(example, names)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _of(session: OnnxRun, name: str) -> Any:
    return session.folder.measured(name)
