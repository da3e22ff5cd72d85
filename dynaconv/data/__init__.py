"""Text to windows of tokens: where text comes from, how it is split, tokenised, cut and drawn. See ``corpus.py``."""
