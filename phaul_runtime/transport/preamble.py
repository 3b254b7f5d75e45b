"""The names of an agent's sockets, and how a connection to the memory socket begins."""

from __future__ import annotations

# The agent's two sockets, in its socket directory.
CONTROL = "control.sock"
MEMORY = "memory.sock"
# A memory connection begins with the migration's id, a tree's with that and the tree's name; then
# what was done to the stream, if anything was; padded to this length.
ID_BYTES = 96
# In the place of a tree's name: the pages of a post-copy move.
PAGES = "@pages"
ZSTD = "+zstd"
