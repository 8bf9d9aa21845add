"""Training: the worker that builds a stage, fits it and checkpoints it."""
