"""Imports all task types that come with rlprune; the wings have some of their own."""

from ..adapter import adapters
from . import classification, embedding, multilabel, own, regression, segmentation

__all__ = ["classification", "embedding", "multilabel", "own", "regression", "segmentation"]

adapters()
