"""Write each architecture of `architectures.py` as ONNX in several forms, verify each file, and print a Markdown table.

python examples/export_table.py            # all of them; half an hour on one core
python examples/export_table.py gpt2 t5    # these

A cell is the largest error of an output against torch over the largest output, with exact activations, at all sizes
that the verification tries. *Uneven* is the model without half the heads and channels of its last layers, where these
may lose them; *packed* is NF4 in blocks of 16, with adapters of rank 2 on linear layers and none on experts. – is a
model that does not write.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from architectures import Architecture, randomized
from tables import print_table
from torch import nn

import graphprune as gp
import quant
from graphprune.errors import GraphPruneError, ShrinkError
from graphprune.export.verify import measure_onnx
from graphprune.export.verify_encoder_decoder import measure_encoder_decoder
from graphprune.export.verify_outputs import TOLERANCE, measure_outputs
from graphprune.pipeline.stacks import find_stacks, pack_stack_

CONFIG = quant.LoftQConfig(format="nf4", block_size=16, rank=2, iterations=1)
FORMS = ("dense", "packed", "uneven", "uneven, packed")
HEADER = (
    "| architecture | with cache: dense | packed | uneven | uneven, packed | without cache: dense | packed | uneven | "
    "uneven, packed |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def row(name: str, architecture: Architecture) -> str:
    """Return the row of one architecture."""
    cells = [cell(architecture, form, write) for write in (with_cache, without_cache) for form in FORMS]
    return f"| {name} | {' | '.join(cells)} |"


def cell(architecture: Architecture, form: str, write: Callable[[Any, Architecture, Path], float]) -> str:
    """Return the error of one form, or why there is none."""
    try:
        model, inputs = architecture.build(), architecture.inputs()
        if write is with_cache and not (hasattr(model, "can_generate") and model.can_generate()):
            return "–"
        if "uneven" in form:
            model = uneven(model, inputs)
        if "packed" in form:
            model = packed(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            return f"{write(model, architecture, Path(folder) / 'onnx'):.0e}"
    except (GraphPruneError, quant.QuantError) as error:
        return error.problem[:90].replace("|", "/")


def uneven(model: nn.Module, inputs: dict[str, Any]) -> nn.Module:
    """Remove half of the heads and channels of the last half of the groups that have some."""
    groups = gp.node_groups(gp.trace(model, inputs))
    problem = ShrinkError("no heads, no channels and nothing else may go", "look at groups.prunable()")
    for kinds in (("attention_heads", "ffn"), ("ffn",), ("other",)):
        found = [group for group in groups.prunable() if group.kind in kinds]
        if not found:
            continue
        last = found[len(found) // 2 :]
        plan = gp.Plan(
            {group.name: range(min(group.size // 2, group.size - group.minimum)) for group in last}
        )
        try:
            return gp.shrink(model, groups, plan, inputs, form="module")
        except ShrinkError as error:
            problem = error
    raise problem


def packed(model: nn.Module, inputs: dict[str, Any]) -> nn.Module:
    """Pack linear layers and stacks of experts, and give the adapters random values."""
    stacks = find_stacks(model, inputs)
    quant.loftq_model(model, CONFIG)
    for stack in stacks:
        pack_stack_(model, stack, CONFIG.format, CONFIG.block_size, CONFIG.scale_storage)
    randomized(nn.ParameterList(p for name, p in model.named_parameters() if "lora" in name), seed=1)
    return model.eval()


def with_cache(model: Any, architecture: Architecture, folder: Path) -> float:
    """Write and verify a decoder, or an encoder and a decoder."""
    inputs = {name: value for name, value in architecture.inputs().items() if isinstance(value, torch.Tensor)}
    texts = inputs.pop("decoder_input_ids", inputs.get("input_ids", torch.empty(0))).tolist()
    if not model.config.is_encoder_decoder:
        return measure_onnx(gp.export_onnx(model, folder), model, texts).max_relative_error
    written = gp.export_onnx(model, folder, examples=inputs)
    return measure_encoder_decoder(written, model, inputs, texts).max_relative_error


def without_cache(model: Any, architecture: Architecture, folder: Path) -> float:
    """Write and verify a function of the examples."""
    examples = architecture.inputs()
    checks = measure_outputs(gp.export_onnx(model, folder, examples=examples), model, examples)
    return max(check.measured for check in checks if check.bound == TOLERANCE)


if __name__ == "__main__":
    print_table(HEADER, row)
