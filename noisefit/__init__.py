"""NoiseFiT: noise augmented fine-tuning on a hand-written Accelerate loop (arXiv 2504.03302)."""

__version__ = "0.1.0"
