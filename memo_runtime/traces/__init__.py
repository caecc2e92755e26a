"""What a training step asked its allocator for: the value, its file, and reading an allocator's history. No torch."""
