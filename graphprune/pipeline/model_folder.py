"""The folders that other tools open: a transformers model, and a PEFT adapter tied to its base."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from graphprune import __version__
from graphprune.errors import ShrinkError
from graphprune.export.adapter_file import write_adapter
from graphprune.files import replacing, write_json, write_text
from graphprune.pipeline.session import Session
from graphprune.shrink.load import KEY, RECORD, load
from graphprune.shrink.plan import Plan
from graphprune.shrink.save import record_of
from quant.linear import QuantLinear

log = logging.getLogger(__name__)

_CARD = """---
tags: [graphprune, pruned]
---
# {name}, pruned

{removed:.1%} of the parameters of `{source}` were removed by graphprune {version} (structured pruning: {what};
{widths}). `graphprune.json` holds which units went.

{opening}

Its licence is that of the model it was made from.
"""

_RECOVERED_CARD = """---
tags: [graphprune, pruned]
---
# {name}, pruned and recovered

The pruned model beside this folder after its recovery: adapters were trained by graphprune {version} and merged.
`graphprune.json` holds which units went.

{opening}

Its licence is that of the model it was made from.
"""

_STOCK = """    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("{folder}")"""

_UNEVEN = """A transformers configuration has one width for all layers, so `from_pretrained` does not open this folder.
What the layers are is in `graphprune.json`, and graphprune builds the stock class by it:

    import graphprune as gp
    model = gp.load("{folder}")"""


def save_model(session: Session, model: Any, plan: Plan, surgery_error: float) -> None:
    """Write the smaller model as a transformers folder, after it has been opened again.

    If its configuration describes it, stock transformers opens the folder. Else the record beside the weights says
    what the layers are, and `graphprune.load` opens it.

    Args:
        session: The run.
        model: The smaller model, adapters merged.
        plan: What was removed.
        surgery_error: Distance of its logits from the masked model's.

    Raises:
        ShrinkError: If the reopened model's logits are not the same, bit for bit.
    """
    folder = session.path("model")
    before = session.folder.measured("parameters")
    after = sum(parameter.numel() for parameter in model.parameters())
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        session.inputs.tokenizer.save_pretrained(temporary)
        record = {
            **record_of(model),
            "source": session.inputs.source.name,
            "parameters": {"before": before, "after": after},
            "surgery_error": surgery_error,
            "removed": {name: list(units) for name, units in plan.items()},
        }
        write_json(temporary / RECORD, record)
        _check_reload(model, temporary, session.examples)
        kinds = sorted({session.groups[name].kind.replace("_", " ") for name in plan})
        what = f"whole units of {', '.join(kinds)}" if kinds else "whole blocks"
        card = _CARD.format(
            name=session.inputs.source.name,
            removed=1 - after / before,
            source=session.inputs.source.name,
            version=__version__,
            what=what,
            widths="layers differ in width" if KEY in record else "every layer has the same widths",
            opening=(_UNEVEN if KEY in record else _STOCK).format(folder=folder.name),
        )
        write_text(temporary / "README.md", card)


def save_recovered(session: Session, model: Any) -> None:
    """Write the recovered float model as a transformers folder beside the pruned one, whose widths it has.

    Args:
        session: The run.
        model: With its adapters merged.

    Raises:
        ShrinkError: If the reopened model's logits are not the same, bit for bit.
    """
    with replacing(session.path("recovered")) as temporary:
        model.save_pretrained(temporary)
        session.inputs.tokenizer.save_pretrained(temporary)
        record = session.path(f"model/{RECORD}").read_text(encoding="utf-8")
        write_text(temporary / RECORD, record)
        _check_reload(model, temporary, session.examples)
        card = _RECOVERED_CARD.format(
            name=session.inputs.source.name,
            version=__version__,
            opening=(_UNEVEN if KEY in json.loads(record) else _STOCK).format(folder="recovered"),
        )
        write_text(temporary / "README.md", card)


def save_adapter(session: Session, model: Any) -> None:
    """Write the adapters of a quantized model as a PEFT folder that names its base by hash, and for ONNX Runtime.

    The base is the quantized one: on the float model these adapters would correct errors that it does not have.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, QuantLinear) or module.lora_A is None or module.lora_B is None:
            continue
        layers.append(name)
        scale = module.scaling**0.5  # PEFT reads alpha / rank = 1 from the configuration below
        tensors[f"base_model.model.{name}.lora_A.weight"] = (module.lora_A.detach() * scale).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (module.lora_B.detach() * scale).contiguous()
    rank = session.recipe.quantize.rank
    with replacing(session.path("adapter")) as temporary:
        temporary.mkdir()
        from peft import LoraConfig

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(layers), task_type="CAUSAL_LM")
        config.inference_mode = True
        config.base_model_name_or_path = "../quant"
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        write_adapter(model, temporary / "adapter.onnx_adapter")
        base = {"file": "quant/quant.safetensors", "sha256": _sha256(session.path("quant/quant.safetensors"))}
        write_json(temporary / "graphprune.json", {"schema": "graphprune.adapter/1", "base": base})


def _check_reload(model: Any, folder: Path, examples: dict[str, Any]) -> None:
    reopened = load(folder, torch.float32)
    model.eval()
    with torch.no_grad():
        ours, theirs = model(**examples).logits, reopened(**examples).logits
    if ours.shape != theirs.shape or not torch.equal(ours, theirs):
        raise ShrinkError(
            "the smaller model computes something else after it was saved and opened again",
            "please report this architecture: what was saved does not describe the smaller model",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
