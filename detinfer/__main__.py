"""``python -m detinfer``."""

from detinfer.cli import main

main()
