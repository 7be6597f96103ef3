"""What the processor can do at most, measured: the scale of every figure in the benchmark."""
