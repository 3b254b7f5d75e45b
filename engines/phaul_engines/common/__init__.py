"""What every engine shares: trees of processes, their identity, their network locks.

It imports nothing else of the engines. Read `proctree` first.
"""
