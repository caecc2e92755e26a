"""Attention forward and backward apart from autograd, from saved outputs."""
