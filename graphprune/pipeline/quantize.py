"""The stage that quantizes: LoftQ on every linear layer, in one format or a mix of them, and stacks of experts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from graphprune.errors import QuantizationError
from graphprune.files import replacing
from graphprune.pipeline.inputs import stack_format
from graphprune.pipeline.model_folder import save_adapter
from graphprune.pipeline.session import Session
from graphprune.pipeline.stacks import check_stack, find_stacks, pack_stack_
from graphprune.source.model import example_inputs
from quant.apply import LayerReport, loftq_model
from quant.calibration import evaluation
from quant.chain import find_chain
from quant.config import LoftQConfig, Reconstruction
from quant.errors import QuantError
from quant.linear import QuantLinear
from quant.mix import mix_for_bits
from quant.storage import save_quantized

Batch = dict[str, Tensor]

# The mix is decided on fewer windows than the layers are fitted to: it compares formats, and needs no inverse.
_MIX_WINDOWS = 24


def quantize_stage(session: Session) -> str:
    """Quantize linear layers, stacks of experts, and an embedding that shares its weight with the head."""
    settings = session.recipe.quantize
    model = session.unquantized()
    stacks = [
        stack for stack in find_stacks(model, example_inputs(model)) if not _excluded(session, stack.name)
    ]
    count = settings.calibration_windows
    windows = session.inputs.train.drawn(count, session.recipe.seed)
    batches = [{"input_ids": ids, "labels": ids} for ids in windows.split(4)] if count else []
    with _as_ours():
        config = _config(session, model)
        for stack in stacks:
            check_stack(model, stack, settings.block_size)
        if settings.bits is not None:
            few = batches[: _MIX_WINDOWS // 4]
            config = replace(config, formats=_mix(session, model, config, settings.bits, few))
        with session.reporter.task("LoftQ") as tick:
            _, layers = loftq_model(
                model,
                config,
                batches or None,
                loss=_loss if count and settings.guided else None,
                on_layer=lambda name, done, total: tick(done, name, total),
            )
        for stack in stacks:
            form = stack_format(settings)
            layers.append(pack_stack_(model, stack, form, settings.block_size, settings.scale_storage))
    model.eval()
    with replacing(session.path("quant")) as temporary:
        save_quantized(model, temporary)
    session.quantized = model
    if session.recipe.recover.base == "pruned":
        save_adapter(session, model)
    value = session.judge(model, "quantized")
    session.folder.remember(
        perplexity_quantized=value,
        layers=[
            {
                "name": layer.name,
                "format": layer.format,
                "shape": list(layer.shape),
                "error_before": layer.errors[0],
                "error_after": min(layer.errors),
            }
            for layer in layers
        ],
    )
    return f"{_summary(model, layers)}; perplexity {value:.2f}"


def check_reconstruction(session: Session) -> None:
    """Raise if the recipe asks for blocks to be reconstructed, and the model is no chain of blocks."""
    if not session.recipe.quantize.reconstruction_epochs:
        return
    model = session.adapted
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with evaluation(model):
        chain = find_chain(model, [session.examples], linears)
    if chain is None:
        raise QuantizationError(
            f"{session.inputs.source.name} is no chain of blocks, each on what the one before puts out, so that no "
            "block can be reconstructed",
            "leave out quantize.reconstruction_epochs",
        )


def _config(session: Session, model: nn.Module) -> LoftQConfig:
    """Return the recipe's section as the quantizer takes it."""
    settings = session.recipe.quantize
    return LoftQConfig(
        format=settings.format,
        block_size=settings.block_size,
        rank=settings.rank,
        iterations=settings.iterations,
        scale_storage=settings.scale_storage,
        propagation=settings.propagation,
        reconstruction=Reconstruction(epochs=settings.reconstruction_epochs)
        if settings.reconstruction_epochs
        else None,
        seed=session.recipe.seed,
        exclude=(*_untied_head(model), *settings.exclude),
        embedding_format=settings.embedding,
    )


def _mix(
    session: Session, model: nn.Module, config: LoftQConfig, bits: float, batches: list[Batch]
) -> tuple[tuple[str, str | int], ...]:
    """Return the formats with which the layers lose the least at so many bits a weight."""
    settings = session.recipe.quantize
    mixed = replace(config, iterations=1, exclude=(*config.exclude, *_head_names(model)))
    with session.reporter.task("mix of formats") as tick:
        return mix_for_bits(
            model,
            mixed,
            bits,
            settings.mix_formats,
            batches or None,
            loss=_loss if batches and settings.guided else None,
            on_layer=lambda name, done, total: tick(done, name, total),
        ).formats


def _excluded(session: Session, name: str) -> bool:
    return any(re.search(expression, name) for expression in session.recipe.quantize.exclude)


def _summary(model: nn.Module, layers: list[LayerReport]) -> str:
    modules = dict(model.named_modules())
    adapted = [layer for layer in layers if _has_adapters(modules.get(layer.name))]
    stacks = Counter(layer.format for layer in layers if layer.name not in modules).most_common()
    formats = Counter(layer.format for layer in adapted).most_common()
    plain = sum(layer.errors[0] for layer in adapted) / max(1, len(adapted))
    best = sum(min(layer.errors) for layer in adapted) / max(1, len(adapted))
    words = ", ".join(f"{count} layers in {name}" for name, count in formats)
    more = "".join(f", {count} stacks of matrices in {name}" for name, count in stacks)
    return f"{words}: error {plain:.3f} → {best:.3f}{more}"


def _has_adapters(module: nn.Module | None) -> bool:
    return isinstance(module, QuantLinear) and module.lora_A is not None


def _loss(output: Any) -> Any:
    return output.loss


@contextmanager
def _as_ours() -> Iterator[None]:
    """Turn the quantizer's errors, which it raises on its own account, into one that the command line prints."""
    try:
        yield
    except QuantError as error:
        raise QuantizationError(error.problem, error.remedy) from error


def _untied_head(model: Any) -> tuple[str, ...]:
    """Return a pattern for a head of its own, which stays as it is; a tied one takes the embedding's format."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is None or table is None or head.weight is table.weight
    return () if tied else _head_names(model)


def _head_names(model: Any) -> tuple[str, ...]:
    head = model.get_output_embeddings()
    return tuple(f"^{re.escape(name)}$" for name, module in model.named_modules() if module is head)
