"""The operators on hidden states: logits = hidden @ weight.T a chunk of tokens at a time, never whole."""
