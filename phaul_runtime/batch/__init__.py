"""Many moves, from any source to any destination, under limits; durable by DBOS.

- `model`: the file of moves. `plan`: which move may start; pure. `outcome`: what follows from an
  attempt; pure.
- `remote_move`: runs one attempt at its source.
- `flow`: the durable workflows. `store`: where they are kept, and who works on them. `run`: drives
  a batch from its beginning or from wherever it was left.
- `events`, `view`, `report_html`: what is shown of it.
"""
