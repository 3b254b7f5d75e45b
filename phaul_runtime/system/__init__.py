"""This host as its kernel has it: processes, cgroups, paths, logs; the door for subprocesses.

It imports errors alone of the core, and every other package imports it. Read `proc` first.
"""
