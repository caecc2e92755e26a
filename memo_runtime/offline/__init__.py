"""Profiles without a GPU and without weights: structure from one block on the CPU, sizes and work from meta tensors."""
