"""Models that run as a graph, on ONNX Runtime or OpenVINO: what lies in the folder, the session, the encoder."""
