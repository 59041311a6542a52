"""Deterministic inference: fix the order of every reduction, leave the schedule free."""

__version__ = "0.1.0"
