"""Machines with other kernels than this one's."""
