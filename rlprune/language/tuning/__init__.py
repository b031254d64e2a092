"""The final fine-tune of a pruned language model."""
