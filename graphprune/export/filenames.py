"""Names of the files that an export writes; reading them loads nothing else."""

FILE = "model.onnx"
DATA_FILE = f"{FILE}.data"
ENCODER_FILE = "encoder.onnx"
DECODER_FILE = "decoder.onnx"
