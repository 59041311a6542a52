"""``detinfer run``: a command and every Python process that it starts, under one policy.

``parent`` starts the command with ``hook`` on PYTHONPATH; in each Python child ``hook/sitecustomize.py`` waits for torch to be
imported, and ``child`` then puts the policy in force and notes what it decides.
"""
