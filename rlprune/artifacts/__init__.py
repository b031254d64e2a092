"""Pruned models and policies on disk: safetensors and JSON, no pickle."""
