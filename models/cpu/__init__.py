"""Kernels that compute on a CPU what a layer does, a few images at a time.

Moving large intermediate results through memory, and asking the system for fresh pages to put them in, costs more there
than the arithmetic on them. A kernel takes a few images through all steps of a layer while these are in cache. Each is
an operation that a compiled graph keeps, and returns None where it may not run, for the layer to go its general way.
"""

from .kernels import is_exporting, is_transformed, may_run, set_cpu_kernels

__all__ = ["is_exporting", "is_transformed", "may_run", "set_cpu_kernels"]
