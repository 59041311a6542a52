"""Timings of detinfer against torch on this machine."""
