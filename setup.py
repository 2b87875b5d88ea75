"""The one thing pyproject.toml cannot say yet: which cffi module to compile."""

from setuptools import setup

setup(cffi_modules=["agent/kernel/build_binding.py:ffibuilder"])
