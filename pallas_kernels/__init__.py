"""Kernels over plain arrays. Each operation has an XLA implementation, and imports nothing of ours."""
