"""CRIU: requests over RPC, restores that it holds, its statistics, what its versions write.

It imports system; memory and all above import it. Read `session` first.
"""
