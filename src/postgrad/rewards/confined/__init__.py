"""What runs on the other side of `postgrad.rewards.sandbox`: a server, its walls, its tasks.

These modules are started as `python -S` from their folder, outside the package and without any
other part of it, so they import each other relatively and else the standard library alone.
"""
