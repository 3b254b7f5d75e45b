"""The contract of the ancestor, the Go library phaul: pre-copy over an engine's `PhaulLocal`.

It knows no migration and imports memory, criu and system; the engine contract and all above
import it. Read `api`, then `client`.
"""
