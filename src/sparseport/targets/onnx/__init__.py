"""ONNX Runtime: graph, weights out, and read back."""
