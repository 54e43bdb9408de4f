"""What the losses need to know of a language model: its output projection."""
