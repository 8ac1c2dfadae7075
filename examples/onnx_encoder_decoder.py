"""Generate tokens from an exported encoder-decoder, greedily, with onnxruntime and numpy alone.

python examples/onnx_encoder_decoder.py FOLDER INPUTS.npz START_TOKEN END_TOKEN

INPUTS.npz holds what the encoder reads by its names, one row or more: input_ids and attention_mask as a tokenizer gives
them, or input_features.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime


def generate(folder: Path, inputs: dict[str, np.ndarray], start: int, steps: int) -> Iterator[np.ndarray]:
    """Yield the next token of each row, int64 (rows,), so many times."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # onnxruntime notes each adapter that may be overridden
    encoder, decoder = (
        onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
        for name in ("encoder.onnx", "decoder.onnx")
    )
    # The encoder runs once: its keys and values are inputs of every step, as its mask is where there is one.
    names = [value.name for value in encoder.get_outputs() if value.name.startswith("present.")]
    encoded = [name.replace("present", "past_key_values", 1) for name in names]
    fixed = dict(zip(encoded, encoder.run(names, inputs), strict=True))
    read = {value.name: value for value in decoder.get_inputs() if value.name not in fixed}
    if "encoder_attention_mask" in read:
        fixed["encoder_attention_mask"] = inputs["attention_mask"]

    # The decoder's own cache starts empty: (rows, heads, 0, width).
    rows = len(next(iter(inputs.values())))
    past = {
        name: np.zeros((rows, value.shape[1], 0, value.shape[3]), np.float32)
        for name, value in read.items()
        if name.startswith("past_key_values.")
    }
    outputs = ["logits", *(name.replace("past_key_values", "present", 1) for name in past)]
    ids = np.full((rows, 1), start)
    for _ in range(steps):
        logits, *present = decoder.run(outputs, {"input_ids": ids, **fixed, **past})
        past = dict(zip(past, present, strict=True))
        ids = logits[:, -1:].argmax(-1)
        yield ids[:, 0]


if __name__ == "__main__":
    exported, start, end = Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
    running = None
    for tokens in generate(exported, dict(np.load(sys.argv[2])), start, steps=100):
        running = tokens != end if running is None else running & (tokens != end)
        print(*tokens, flush=True)
        if not running.any():
            break
