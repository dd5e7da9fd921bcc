"""Programs around training: quick start, evaluation, server, web page, benchmarks."""
