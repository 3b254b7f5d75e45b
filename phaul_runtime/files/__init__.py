"""A target's files and directories: compared, carried, put in place as their owners.

It imports cutover (what is made is journaled before) and engine; rpc and both ends import it.
Read `compare`, then `staged_files` and `tree_sender`.
"""
