"""Generators of pages, the fuzzer and the soak test: run by `make`, not by users."""
