"""A module as a compact ONNX file, verified."""
