"""One migration as its source runs it: preflight, carrying, pre-copy, cut-over, failures.

It imports recovery and below; the command line and batches import it. Read `migration`.
"""
