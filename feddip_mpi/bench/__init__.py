"""Benchmarks that run anywhere: on a laptop, between network namespaces, on a cluster."""
