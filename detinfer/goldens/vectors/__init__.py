"""Portable vectors: inputs and outputs of one operation, made by the reference, that every path on every machine gives.

A golden of a model says what one model did; vectors say what an operation is. ``make`` computes them from
detinfer/reference alone, ``file`` writes and reads the folder, ``replay`` runs them through the paths of this machine.
"""
