"""Generate text from an exported folder with onnxruntime, numpy and tokenizers alone.

python examples/generate.py runs/demo/onnx "The capital of France is"
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, prompt = Path(sys.argv[1]), sys.argv[2]
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
options = onnxruntime.SessionOptions()
options.log_severity_level = (
    3  # adapters are initializers that may be overridden; onnxruntime notes each of them
)
session = onnxruntime.InferenceSession(
    str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
)

# The cache starts empty: (batch, heads, 0, width), with heads and width of each layer as the file says.
cache = {
    item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
    for item in session.get_inputs()
    if item.name.startswith("past_key_values.")
}
ids, position = np.array([tokenizer.encode(prompt).ids]), 0
print(prompt, end="", flush=True)
for _ in range(40):
    length = ids.shape[1]
    logits, *present = session.run(
        None,
        {
            "input_ids": ids,
            "attention_mask": np.ones((1, position + length), np.int64),
            "position_ids": np.arange(position, position + length)[None],
            **cache,
        },
    )
    cache, position = dict(zip(cache, present, strict=True)), position + length
    ids = logits[:, -1:].argmax(-1)
    print(tokenizer.decode([int(ids[0, 0])]), end="", flush=True)
print()
