"""Measure a checkpoint: speed, accepted length, and that the output is the target's."""
