"""What becomes of a trained network: its cost, its speed, fusion, ONNX."""
