"""The destination's agent: the calls that it answers, its sockets, itself as a service.

It imports recovery and below, nothing of source; only the command line imports it. Read `calls`,
then `server`.
"""
