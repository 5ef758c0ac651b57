"""Triton kernels, one per op, each with its launcher. They import nothing of the package."""
