"""hpcdit renders batches of videos with diffusion transformers on a cluster."""

__version__ = "0.1.0"
