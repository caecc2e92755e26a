"""Pinned host memory and copies between it and the device: the native core, and its twin in Python.

``backend.choose_backend`` gives one of them by the mode ``auto | on | off``; both make the same slabs and engines.
"""
