"""What other libraries print by themselves, turned down for the command line."""

from __future__ import annotations

import logging
import os
import warnings


def quieten() -> None:
    """Keep warnings and progress bars of libraries off the terminal; errors still come through.

    To be called before transformers is imported, which reads its settings once.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("graphprune").setLevel(logging.INFO)
    # The exporter's own logger by its name: torch sets the level of "torch.onnx" when it is imported.
    for name in ("torch.onnx", "torch.onnx._internal.exporter._registration"):
        logging.getLogger(name).setLevel(logging.ERROR)
