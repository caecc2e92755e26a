"""Machines to plan for without having one: what a GPU has, how fast it and its links are, and who says so."""
