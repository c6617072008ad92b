"""Everything that is claimed for a GPU, measured in one go: `python -m bench.gpu_proof --out DIR`."""
