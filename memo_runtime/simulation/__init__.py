"""What PyTorch's caching allocator would do with a trace. Needs neither torch nor a device."""
