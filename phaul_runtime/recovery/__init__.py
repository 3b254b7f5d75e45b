"""After a failure: what stands at one end (`resolve`), and what both ends do (`recover`).

It imports destination and below; the source and the agent import it. Read `recover`.
"""
