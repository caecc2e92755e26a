"""Plan -> step: the executors, their stash, the copies, and what they report."""
