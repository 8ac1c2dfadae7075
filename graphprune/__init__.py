"""graphprune turns a transformer into a smaller, low-bit ONNX model, and proves that it did so correctly.

The names below are the public Python interface. They load on first use, so that ``import graphprune``
costs next to nothing: torch and transformers are imported by the functions that need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphprune.certify.certificate import certify as certify
    from graphprune.coupling.groups import node_groups as node_groups
    from graphprune.coupling.node_group import NodeGroup as NodeGroup
    from graphprune.coupling.rules import rule as rule
    from graphprune.export.quantize_onnx import quantize_onnx as quantize_onnx
    from graphprune.export.verify import verify_onnx as verify_onnx
    from graphprune.export.verify_encoder_decoder import verify_encoder_decoder as verify_encoder_decoder
    from graphprune.export.verify_outputs import verify_outputs as verify_outputs
    from graphprune.export.write import export_onnx as export_onnx
    from graphprune.prune.cubic_schedule import CubicSchedule as CubicSchedule
    from graphprune.prune.lhspg import LHSPG as LHSPG
    from graphprune.prune.loraprune import LoRAPrune as LoRAPrune
    from graphprune.prune.one_shot import prune_one_shot as prune_one_shot
    from graphprune.prune.onnx import prune_onnx as prune_onnx
    from graphprune.prune.paper_mode import PaperChoices as PaperChoices
    from graphprune.prune.param_groups import param_groups as param_groups
    from graphprune.prune.repair.activations import Calibration as Calibration
    from graphprune.prune.repair.least_squares import LeastSquares as LeastSquares
    from graphprune.prune.trainer_callback import LHSPGCallback as LHSPGCallback
    from graphprune.shrink.load import load as load
    from graphprune.shrink.model import shrink as shrink
    from graphprune.shrink.optimizer import shrink_optimizer as shrink_optimizer
    from graphprune.shrink.plan import Plan as Plan
    from graphprune.shrink.save import save as save
    from graphprune.trace.model import trace as trace

__version__ = "0.1.0"

_HOME = {
    "Calibration": "graphprune.prune.repair.activations",
    "CubicSchedule": "graphprune.prune.cubic_schedule",
    "LHSPG": "graphprune.prune.lhspg",
    "LHSPGCallback": "graphprune.prune.trainer_callback",
    "LeastSquares": "graphprune.prune.repair.least_squares",
    "LoRAPrune": "graphprune.prune.loraprune",
    "NodeGroup": "graphprune.coupling.node_group",
    "PaperChoices": "graphprune.prune.paper_mode",
    "Plan": "graphprune.shrink.plan",
    "certify": "graphprune.certify",
    "export_onnx": "graphprune.export.write",
    "load": "graphprune.shrink.load",
    "node_groups": "graphprune.coupling.groups",
    "param_groups": "graphprune.prune.param_groups",
    "prune_one_shot": "graphprune.prune.one_shot",
    "prune_onnx": "graphprune.prune.onnx",
    "quantize_onnx": "graphprune.export.quantize_onnx",
    "rule": "graphprune.coupling.rules",
    "save": "graphprune.shrink.save",
    "shrink": "graphprune.shrink",
    "shrink_optimizer": "graphprune.shrink.optimizer",
    "trace": "graphprune.trace",
    "verify_encoder_decoder": "graphprune.export.verify_encoder_decoder",
    "verify_onnx": "graphprune.export.verify",
    "verify_outputs": "graphprune.export.verify_outputs",
}
_PACKAGES = ("certify", "shrink", "trace")  # called like the function that they are named after

__all__ = [
    "LHSPG",
    "Calibration",
    "CubicSchedule",
    "LHSPGCallback",
    "LeastSquares",
    "LoRAPrune",
    "NodeGroup",
    "PaperChoices",
    "Plan",
    "certify",
    "export_onnx",
    "load",
    "node_groups",
    "param_groups",
    "prune_one_shot",
    "prune_onnx",
    "quantize_onnx",
    "rule",
    "save",
    "shrink",
    "shrink_optimizer",
    "trace",
    "verify_encoder_decoder",
    "verify_onnx",
    "verify_outputs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graphprune' has no attribute '{name}'")
    module = importlib.import_module(_HOME[name])
    return module if name in _PACKAGES else getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
