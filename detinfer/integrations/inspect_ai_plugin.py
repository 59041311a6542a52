"""What Inspect's entry point loads: importing this registers the provider ``detinfer`` and its hook."""

from detinfer.integrations.inspect_ai import register

register()
