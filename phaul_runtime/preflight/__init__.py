"""What has to be right before a move: the facts of a host, and one check a function.

It imports postcopy and below; source, destination and the agent import it. Read `checks`.
"""
