"""Clusterings of the embeddings of frozen encoders."""

from phyla.cluster.temi import TEMI

__all__ = ["TEMI"]
