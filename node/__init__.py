"""What a person runs: the command line, configuration, identity, data, wiring, metrics and benchmarks."""
