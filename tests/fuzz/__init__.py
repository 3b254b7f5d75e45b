"""What peers send and what lies on a disk, mutated: nothing but errors of ours may come of it."""
