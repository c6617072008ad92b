"""Microbenchmarks of the ops: beside the physical limit of the device, and beside other people's kernels."""
