"""Printing Markdown tables of which each row is an architecture, as they are measured."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable

import torch
import transformers
from architectures import ARCHITECTURES, Architecture


def print_table(header: str, row: Callable[[str, Architecture], str]) -> None:
    """Print the rows of the architectures that the command line names, or of all.

    Args:
        header: The table's first two lines.
        row: From a name and its architecture to a line.
    """
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(header)
    for name in sys.argv[1:] or list(ARCHITECTURES):
        print(row(name, ARCHITECTURES[name]), flush=True)
