"""PEFT's files of adapters: their names, and the ``LoraConfig`` that fits a set of layers.

The fields follow ``peft.LoraConfig``; PEFT itself is not needed to write them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

PREFIX = "base_model.model."
TENSORS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def lora_config(
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    *,
    modules: Iterable[str] = (),
    fan_in_fan_out: bool = False,
    base: str | None = None,
) -> dict[str, Any]:
    """Return the fields of the ``LoraConfig`` whose adapters these are.

    Args:
        ranks: Rank of each adapted layer, by its qualified name.
        scalings: What each layer's product B A is multiplied by.
        modules: Names of all modules of the model, to keep PEFT from adapting others whose names end alike.
        fan_in_fan_out: Whether the weights are stored (in, out), as Conv1D's.
        base: Name or path of the base model.

    Returns:
        Different ranks and scalings are in ``rank_pattern`` and ``alpha_pattern``.
    """
    alphas = {name: _alpha(rank, scalings[name]) for name, rank in ranks.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    # PEFT takes a name in target_modules for the end of a name too.
    others = [name for name in modules if name not in ranks and name.endswith(tuple(f".{n}" for n in ranks))]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(name): each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {_pattern(name): each for name, each in alphas.items() if each != alpha},
        "target_modules": sorted(ranks),
        "exclude_modules": "|".join(map(re.escape, others)) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }


def _pattern(name: str) -> str:
    """Return an expression that matches this whole name alone, among PEFT's patterns."""
    return f"^{re.escape(name)}"


def _alpha(rank: int, scaling: float) -> float:
    alpha = scaling * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
