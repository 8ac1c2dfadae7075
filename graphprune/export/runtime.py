"""Running an exported decoder with nothing but onnxruntime and numpy."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Past = list[Array]


class OnnxDecoder:
    """A session over `model.onnx` on the CPU.

    Args:
        model: The file, or the bytes of its graph; then `folder` says where its data lies.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
        folder: Where the external data of a graph given as bytes lies.
        settings: Further entries of the session's configuration.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int | None = None,
        folder: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if folder is not None:
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, str(folder.resolve()))
        for key, value in (settings or {}).items():
            options.add_session_config_entry(key, value)
        source = model if isinstance(model, bytes) else str(model)
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._past = [
            value for value in self._session.get_inputs() if value.name.startswith("past_key_values.")
        ]
        self._outputs = [
            "logits",
            *(value.name.replace("past_key_values", "present", 1) for value in self._past),
        ]

    def empty_past(self, batch: int) -> Past:
        """Return a cache of no tokens: key, value, key, value, ..., each (batch, heads, 0, head size)."""
        return [np.zeros((batch, v.shape[1], 0, v.shape[3]), dtype=np.float32) for v in self._past]

    def step(
        self, input_ids: Integers, attention_mask: Integers | None = None, past: Past | None = None
    ) -> tuple[Array, Past]:
        """Run the model on new tokens.

        Args:
            input_ids: int64 (batch, sequence), shorter rows padded on the left.
            attention_mask: int64 (batch, past + sequence), 0 for padding; None if there is none.
            past: The cache of the tokens before; None if there are none.

        Returns:
            The logits (batch, sequence, vocabulary) and the new cache.
        """
        batch, sequence = input_ids.shape
        past = self.empty_past(batch) if past is None else past
        if attention_mask is None:
            attention_mask = np.ones((batch, past[0].shape[2] + sequence), dtype=np.int64)
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -sequence:]
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        feeds |= {value.name: array for value, array in zip(self._past, past, strict=True)}
        logits, *present = self._session.run(self._outputs, feeds)
        return logits, present

    def logits(
        self, input_ids: Integers, attention_mask: Integers | None = None, past: Past | None = None
    ) -> Array:
        """Return the logits of `step` alone, float32 (batch, sequence, vocabulary)."""
        return self.step(input_ids, attention_mask, past)[0]

    def greedy(
        self, input_ids: Sequence[int], max_new_tokens: int, eos_token_ids: Collection[int] = ()
    ) -> list[int]:
        """Return the most likely continuation token by token, up to and with the first end token."""
        tokens: list[int] = []
        ids, past = np.array([input_ids], dtype=np.int64), None
        while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in eos_token_ids):
            logits, past = self.step(ids, past=past)
            tokens.append(int(logits[0, -1].argmax()))
            ids = np.array([tokens[-1:]], dtype=np.int64)
        return tokens

    def decode_speed(self, prompt_ids: Sequence[int], tokens: int, *, warm_up: int = 3) -> float:
        """Return tokens a second at batch 1: one over the median wall time of a decoding step.

        Args:
            prompt_ids: Tokens of the prompt, which is not timed.
            tokens: Steps that are timed.
            warm_up: Steps before them.
        """
        logits, past = self.step(np.array([prompt_ids], dtype=np.int64))
        seconds = []
        for _ in range(warm_up + tokens):
            ids = logits[:, -1:].argmax(axis=-1).astype(np.int64)
            start = time.perf_counter()
            logits, past = self.step(ids, past=past)
            seconds.append(time.perf_counter() - start)
        return 1.0 / float(np.median(seconds[warm_up:]))
