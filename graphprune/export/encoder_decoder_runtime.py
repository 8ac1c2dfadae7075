"""Running an exported encoder-decoder with nothing but onnxruntime and numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.export.exact import EXACT, exact_graph
from graphprune.export.filenames import DECODER_FILE, ENCODER_FILE
from graphprune.export.runtime import OnnxDecoder, Provider, clear_errors, open_session

MASK = "attention_mask"
ENCODER_MASK = "encoder_attention_mask"
"""What a file calls the mask of the encoder's inputs: the encoder, and the decoder."""


class OnnxEncoderDecoder:
    """Sessions over `encoder.onnx` and `decoder.onnx`.

    Args:
        folder: Where the two lie.
        exact: Round no activation, as slow kernels do; for verifications.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
        provider: What computes: ``cpu`` or ``cuda``.

    Raises:
        RecipeError: If `provider` is no name of one.
        SourceError: If it cannot be used here, or a file does not open, or does not go with the other.
    """

    def __init__(
        self, folder: Path, *, exact: bool = False, threads: int | None = None, provider: Provider = "cpu"
    ) -> None:
        self._folder = folder
        self.encoder, self._decoder = (
            open_session(
                exact_graph(folder / file) if exact else folder / file,
                threads=threads,
                folder=folder if exact else None,
                provider=provider,
                settings=EXACT if exact else None,
            )
            for file in (ENCODER_FILE, DECODER_FILE)
        )
        self._cross = [
            value.name for value in self.encoder.get_outputs() if value.name.startswith("present.")
        ]
        self._masked = ENCODER_MASK in {value.name for value in self._decoder.get_inputs()}

    def encode(self, inputs: Mapping[str, npt.NDArray[Any]]) -> OnnxDecoder:
        """Run the encoder.

        Args:
            inputs: Its inputs by name; the mask may be left out where nothing is padding.

        Returns:
            The decoder that attends to them, each row of its batch to a row of theirs. It is used like one without
            an encoder.

        Raises:
            SourceError: If ONNX Runtime refuses the inputs, or the files are not of one export.
        """
        given = dict(inputs)
        if self._masked and MASK not in given:
            given[MASK] = np.ones(next(iter(given.values())).shape[:2], dtype=np.int64)
        with clear_errors(str(self._folder / ENCODER_FILE)):
            cross = self.encoder.run(self._cross, given)
        fixed = {
            name.replace("present", "past_key_values", 1): array
            for name, array in zip(self._cross, cross, strict=True)
        }
        if self._masked:
            fixed[ENCODER_MASK] = given[MASK]
        return OnnxDecoder(self._decoder, folder=self._folder / DECODER_FILE, fixed=fixed)
