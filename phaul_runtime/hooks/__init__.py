"""An operator's programs at steps of a move.

It imports cutover: a hook is told of a journal. Config and both ends import it. Read `lifecycle`.
"""
