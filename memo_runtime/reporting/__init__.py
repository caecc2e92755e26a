"""Readable text from records; needs neither torch nor a GPU."""
