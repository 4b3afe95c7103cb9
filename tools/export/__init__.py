"""Checkpoints for other programs: weights, Hugging Face's layout, ONNX, PyTorch's exported programs."""
