"""Lamina compared with its peers: `python -m benchmarks.run` measures both in the same run and prints one table."""
