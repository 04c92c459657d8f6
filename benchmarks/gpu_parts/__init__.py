"""The parts of `benchmarks/gpu.py`: each a function from a device and a size to rows of its report, as they come."""
