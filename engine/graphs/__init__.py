"""A spec and an artifact become ONNX graphs: what a model computes, and a dialect that says how on one target."""
