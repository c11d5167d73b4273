"""How generate.py and evaluate.py answer: sampling, batches of rows, the page, the chat in the terminal."""
