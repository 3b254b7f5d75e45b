"""One migration as its destination sees it: from Open to Commit or Abort.

It imports preflight and below; recovery and the agent import it. Read `incoming`, then `copy`.
"""
