"""A block of a model in torch terms: finding it, its call, what it saves, running it again."""
