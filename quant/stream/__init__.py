"""LoftQ over checkpoints larger than memory: read, quantized and written a layer at a time.

Not imported by `import quant`. Needs safetensors.
"""

from __future__ import annotations

from quant.stream.checkpoint import loftq_checkpoint
from quant.stream.config import StreamConfig
from quant.stream.load import load_checkpoint_

__all__ = ["StreamConfig", "load_checkpoint_", "loftq_checkpoint"]
