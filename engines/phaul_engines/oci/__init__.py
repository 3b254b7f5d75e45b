"""What every OCI runtime shares: its containers, their checks, their half at the source.

It imports `common`; the engines of runtimes and of what manages them import it. Read `runtime`.
"""
