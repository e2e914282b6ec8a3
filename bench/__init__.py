"""Benchmarks: the product beside the limit of its own SQL, in one run."""
