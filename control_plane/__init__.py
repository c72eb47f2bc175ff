"""The control plane: answers requests from the database. Never imports ray, torch or a tokenizer."""
