"""All that needs a GPU, in two parts of a few minutes each, without network: `python -m benchmarks.gpu_check part1`."""
