"""The benchmarks of scripts/bench.py, a module each; slow imports are inside functions."""
