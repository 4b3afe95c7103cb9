"""CPU kernels, which compute a layer for a few images at a time.

On a CPU, moving large intermediate results through memory and allocating pages for them costs more than the arithmetic.
A kernel takes a few images through all steps of a layer while the data is in cache. Each kernel is a custom operator in
a compiled graph. If it cannot run (`may_run`), the layer uses its general implementation.
"""
