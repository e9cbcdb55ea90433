"""Benchmarks: each compares two things in one run and writes its full result to a file."""
