"""Causal language models of transformers: their adapter, texts, files and training."""
