"""A model as other runtimes take it: ONNX and OpenVINO graphs (also in 16 and 8 bits), and GGUF files."""
