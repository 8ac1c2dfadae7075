"""The stages. Each leaves its result in the run folder, whole, and returns a few words about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graphprune.certify.certificate import certify
from graphprune.errors import ShrinkError, VerificationError
from graphprune.export.runtime import OnnxDecoder
from graphprune.export.shared_cache import check_attention
from graphprune.export.verify import verify_onnx
from graphprune.export.write import export_onnx
from graphprune.files import remove, replacing, size_of, write_json, write_text
from graphprune.pipeline.genai import write_genai
from graphprune.pipeline.model_folder import save_adapter, save_model, save_recovered
from graphprune.pipeline.quantize import check_reconstruction
from graphprune.pipeline.session import Session
from graphprune.pipeline.widths import budget_that_opens, describe_widths, measured_budget
from graphprune.prune.budget import Budget, targets
from graphprune.prune.methods.registry import Pruned, Task, check_task, method_named
from graphprune.prune.precision import use_bfloat16
from graphprune.prune.training import Row
from graphprune.recover.recovery import Recovered, recover
from graphprune.report.formatting import against_dense
from graphprune.report.group_document import group_document
from graphprune.report.group_files import write_groups
from graphprune.shrink.biases import config_with_biases
from graphprune.shrink.load import is_uneven
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.source.adapters import attach_adapters, plain_paths
from quant.storage import save_quantized

Stage = Callable[[Session], str]

# Surgery in float32 adds up in another order than the gated model; adapters are merged on the way.
SURGERY_TOLERANCE = 1e-3
# The exported model may be worse than the torch model that it was made from by this factor, no more.
PERPLEXITY_FACTOR = 1.05


def trace_stage(session: Session) -> str:
    """Trace the model with adapters attached, write its node groups, and see whether the recipe can be done."""
    with session.reporter.task("torch.export and coupling analysis"):
        groups = session.groups
    write_groups(group_document(groups, session.inputs.source.name), session.path("graph"))
    session.folder.remember(parameters=_count(session))
    rehearse(session)
    prunable = sum(group.prunable for group in groups.values())
    return f"{len(groups.graph.operators)} operators, {len(groups)} node groups, {prunable} prunable"


def rehearse(session: Session) -> None:
    """Raise, in little time, if the model as traced cannot be pruned or written as the recipe asks."""
    if session.recipe.prune.repair == "bias":
        _check_biases(session)
    check_reconstruction(session)
    if session.recipe.export.cache == "shared":
        check_attention(session.groups.graph.operators)
    check_task(_task(session, budget_that_opens))


def certify_stage(session: Session) -> str:
    """Prove on the model's own weights that the groups are right."""
    certificate = certify(session.adapted, session.groups, session.examples, seed=session.recipe.seed)
    certificate.raise_if_failed()
    write_json(session.path("graph/certificate.json"), certificate.row())
    return (
        f"{certificate.groups} groups permuted at once: {certificate.permuted_max_error:.1e}; "
        f"removed against zeroed: {certificate.removed_max_error:.1e}"
    )


def dense_stage(session: Session) -> str:
    """Measure the model as it came."""
    with session.as_it_came() as model:
        value = session.judge(model, "dense model")
        texts = [session.write(model, prompt) for prompt in session.recipe.report.prompts]
    session.folder.remember(perplexity_dense=value, written_dense=texts)
    return f"perplexity {value:.2f}"


def prune_stage(session: Session) -> str:
    """Prune by the recipe's method, cut what it says out, and save the smaller model."""
    settings, model, groups = session.recipe.prune, session.adapted, session.groups
    pruned = method_named(settings.method)(_task(session, measured_budget))
    _write_metrics(session.path("training/metrics.jsonl"), "prune", pruned.metrics)
    small, distance = _cut(session, pruned)
    budget = pruned.budget
    pruned.plan.save(
        session.path("plan.json"), asked=budget.asked, achieved=budget.removed_share, budget=budget.unit
    )
    save_model(session, small, pruned.plan, distance)
    before, after = _count(session), sum(parameter.numel() for parameter in small.parameters())
    session.folder.remember(
        widths=[
            {
                "name": name,
                "kind": group.kind,
                "before": group.size,
                "after": group.size - budget.removed_units.get(name, 0),
            }
            for name, group in groups.items()  # those that stay whole too: the picture counts layers
            if group.kind in {groups[lost].kind for lost in budget.removed_units}
        ],
        parameters_after=after,
        pruning_steps=len(pruned.metrics),
        training_dtype="bfloat16" if use_bfloat16(settings.training, model) else "float32",
        surgery_error=distance,
    )
    session.forget_dense()
    return (
        f"{1 - after / before:.1%} of {before / 1e6:.1f} M parameters removed "
        f"(asked {budget.asked:.0%} of {budget.unit}, got {budget.removed_share:.1%}); "
        f"masked against shrunk: {distance:.1e}"
    )


def _task(session: Session, allot: Callable[[Session, Mapping[str, torch.Tensor]], Budget]) -> Task:
    return Task(
        session.adapted,
        session.groups,
        session.recipe.prune,
        session.inputs.train,
        allot=partial(allot, session),
        example_inputs=session.examples,
        seed=session.recipe.seed,
        announce=session.reporter.task,
    )


def _cut(session: Session, pruned: Pruned) -> tuple[Any, float]:
    """Return the smaller model, adapters merged, and how far its logits are from the masked model's."""
    model, groups = session.adapted, session.groups
    small: Any = pruned.cut(lambda: shrink(model, groups, pruned.plan, session.examples, form="module"))
    small = small.merge_and_unload() if pruned.model is None else small
    with torch.no_grad():
        distance = _distance(small(**session.examples).logits, pruned.masked_logits)
    if not distance <= SURGERY_TOLERANCE:
        raise ShrinkError(
            f"the smaller model's logits are off by {distance:.1e} of the masked model's",
            "please report this model",
        )
    if pruned.model is not None:
        return small, distance
    small.config = describe_widths(session, small, pruned.budget, pruned.plan)
    return small, distance


def _check_biases(session: Session) -> None:
    """Refuse biases that stock classes could not open again, before anything is trained."""
    groups, plain = session.groups, plain_paths(session.adapted)
    paths = [
        member.parameter.rpartition(".")[0]
        for group in targets(groups, session.recipe.prune.kinds)
        for member in group.consumers
    ]
    wanted = [f"{plain[path]}.bias" for path in paths if path in plain]
    config_with_biases(type(session.dense), session.inputs.config, wanted)


def reload_stage(session: Session) -> str:
    """Open the smaller model as its user will, and measure it."""
    session.detach_adapters()
    value = session.judge(session.pruned(), "pruned")
    session.folder.remember(perplexity_pruned=value)
    opened = "AutoModelForCausalLM"
    if is_uneven(session.path("model")):
        opened = "graphprune.load, for layers differ in width and stock from_pretrained does not open them"
    return f"opened by {opened}; perplexity {value:.2f}"


def recover_stage(session: Session) -> str:
    """Train adapters: on the quantized base, or on the pruned model, into which they are merged."""
    settings, sources = session.recipe.recover, session.inputs.sources
    session.detach_adapters()
    on_pruned = settings.base == "pruned"
    torch.manual_seed(session.recipe.seed)
    model = (
        attach_adapters(session.pruned(), settings.rank, settings.alpha) if on_pruned else session.quantized
    )
    is_measured = any(source.held_out is not None for source in sources)
    with session.reporter.task("recovery", settings.steps) as tick:
        recovered = recover(
            model,
            session.dense if is_measured or settings.training.distill > 0 else None,
            settings,
            sources,
            seed=session.recipe.seed + 1,
            checkpoint=session.path("training/recovery"),
            progress=lambda row: tick(row["step"] + 1, f"loss {row['loss']:.3f}"),
        )
    if on_pruned:
        model = model.merge_and_unload()
    value = session.judge(model, "recovered")
    _write_metrics(session.path("training/metrics.jsonl"), "recover", recovered.rows)
    if on_pruned:
        save_recovered(session, model)
    else:
        with replacing(session.path("quant")) as temporary:
            save_quantized(model, temporary)
        save_adapter(session, model)
    session.folder.remember(
        perplexity_recovered=value,
        recovered_steps=len(recovered.rows),
        recovery=[{**row.row(), "kept": row is recovered.best} for row in recovered.rounds],
    )
    return f"{len(recovered.rows)} steps{_rounds(recovered)}; perplexity {value:.2f}"


def _rounds(recovered: Recovered) -> str:
    best = recovered.best
    if best is None:
        return ""
    return (
        f" in {sum(row.number > 0 for row in recovered.rounds)} rounds; the best is {best.phase} {best.number}: "
        f"mean loss {against_dense(recovered.rounds[0].mean)} the dense model's → {against_dense(best.mean)}"
    )


def export_stage(session: Session) -> str:
    """Write the ONNX model, and give it its final name only once it is verified."""
    unverified = session.path("onnx.unverified")
    remove(unverified)
    plan = Plan.load(session.path("plan.json"))
    metadata = {
        "graphprune.plan": json.dumps({name: list(units) for name, units in plan.items()}),
        "graphprune.source": session.inputs.source.name,
    }
    settings = session.recipe.export
    exact = settings.weights == "exact"
    with session.reporter.task("torch.onnx export"):
        path = export_onnx(
            session.quantized,
            unverified,
            profile=settings.profile,
            exact=exact,
            adapters=settings.adapters,
            cache=settings.cache,
            metadata=metadata,
        )
        session.inputs.tokenizer.save_pretrained(unverified)
        write_genai(session, unverified)
    windows = [
        row[: settings.verify_tokens].tolist()
        for row in session.inputs.evaluate.ids[: settings.verify_windows]
    ]
    with session.reporter.task("verification against torch"):
        verification = verify_onnx(path, session.quantized, windows)
    value = session.judge_logits(_onnx_logits(OnnxDecoder(path)), "ONNX")
    last = "quantized" if session.recipe.recover.base == "pruned" else "recovered"
    reference = session.folder.measured(f"perplexity_{last}")
    if value > PERPLEXITY_FACTOR * reference:
        raise VerificationError(
            f"the ONNX model's perplexity is {value:.2f}, the torch model's {reference:.2f}",
            f"set export.weights to exact; the files are in {unverified}",
        )
    with replacing(session.path("onnx")) as temporary:
        unverified.rename(temporary)
    session.folder.remember(perplexity_onnx=value, verification=_verification_row(verification))
    size = size_of(session.path("onnx/model.onnx")) + size_of(session.path("onnx/model.onnx.data"))
    return f"{size / 1e6:.1f} MB; logits within {verification.max_abs_error:.1e}; perplexity {value:.2f}"


def speed_stage(session: Session) -> str:
    """Measure decoding speed beside the dense model's ONNX, and let the compact model write."""
    settings = session.recipe.report
    prompt = session.inputs.evaluate.ids[0, :16].tolist()
    compact = OnnxDecoder(session.path("onnx/model.onnx"))
    session.folder.remember(
        written_compact=[_written_by(session, compact, text) for text in settings.prompts]
    )
    if not settings.speed_tokens:
        return "not asked for"
    with replacing(session.path("dense-onnx")) as scratch, session.reporter.task("dense ONNX for comparison"):
        dense = OnnxDecoder(export_onnx(session.dense, scratch))
        speeds = [d.decode_speed(prompt, settings.speed_tokens) for d in (dense, compact, dense, compact)]
    del dense
    remove(session.path("dense-onnx"))
    dense_speed, compact_speed = max(speeds[0::2]), max(speeds[1::2])
    session.folder.remember(speed_dense=dense_speed, speed_compact=compact_speed)
    return f"{compact_speed:.1f} tokens/s, dense float32 {dense_speed:.1f}"


def _written_by(session: Session, decoder: OnnxDecoder, prompt: str) -> str:
    tokenizer = session.inputs.tokenizer
    ids = decoder.greedy(
        session.prompt_ids(prompt), session.recipe.report.new_tokens, eos_token_ids=[tokenizer.eos_token_id]
    )
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _onnx_logits(decoder: OnnxDecoder) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: torch.from_numpy(decoder.logits(ids.numpy()))


def _count(session: Session) -> int:
    return sum(p.numel() for name, p in session.adapted.named_parameters() if name in session.counted)


def _distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


def _write_metrics(path: Path, stage: str, rows: list[Row]) -> None:
    kept = [
        line
        for line in (path.read_text(encoding="utf-8").splitlines() if path.is_file() else [])
        if json.loads(line)["stage"] != stage
    ]
    new = [json.dumps({"stage": stage, **row}, sort_keys=True) for row in rows]
    write_text(path, "".join(f"{line}\n" for line in (*kept, *new)))


def _verification_row(verification: Any) -> dict[str, Any]:
    return {
        "max_abs_error": verification.max_abs_error,
        "top1_agreement": verification.top1_agreement,
        "kl": verification.kl,
        "tokens": verification.tokens,
        "checks": dict(verification.checks),
    }
