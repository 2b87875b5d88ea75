"""Spanloom: a zero-code tracing agent for HTTP traffic, built on eBPF."""

__version__ = "0.1.0"
