"""Folders of pruned language models that transformers reads."""
