"""Records the allocator's traces of real training steps on a GPU."""
