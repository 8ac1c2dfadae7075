"""Training after surgery, on the quantized base."""
