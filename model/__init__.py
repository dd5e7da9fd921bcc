"""The network and its tokenizer."""
