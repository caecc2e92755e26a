"""Step -> Profile: what each block saves, what it costs, how fast the link is."""
