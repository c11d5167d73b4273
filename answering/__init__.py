"""What generate.py and evaluate.py answer with: sampling, batches, the page and the chat in the terminal."""
