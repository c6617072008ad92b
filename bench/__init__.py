"""Benchmarks and the scripts that turn their results into the README's tables."""
