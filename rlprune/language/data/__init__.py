"""Texts and examples as token sequences: files, their formats, answers and their masks, mixtures, disjoint splits."""
