"""What onnxruntime-genai is told of a run's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphprune.export.genai import write_genai_config
from graphprune.pipeline.session import Session

_CONTEXT = 2048
_NO_LIMIT = 10**9  # transformers writes a huge number where a tokenizer has no limit


def write_genai(session: Session, folder: Path) -> None:
    """Write `genai_config.json` beside a run's ONNX model.

    Args:
        session: The run.
        folder: Where the model is.
    """
    config, tokenizer = session.quantized.config, session.inputs.tokenizer
    ends = session.quantized.generation_config.eos_token_id
    write_genai_config(
        folder,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        context_length=_context_length(config, tokenizer),
        eos_token_ids=ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends],
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _context_length(config: Any, tokenizer: Any) -> int:
    """Return how many tokens a model takes; of one without a table of positions its tokenizer may know."""
    length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return int(length) if length < _NO_LIMIT else _CONTEXT
