"""``detinfer bench``: this machine's speed against torch's default, side by side in one run."""

from __future__ import annotations

import click


@click.group()
def bench() -> None:
    """Time the canonical kernels against torch's default, as ratios of one run."""
