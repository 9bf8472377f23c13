"""Clusterings of the embeddings of frozen encoders."""

from phyla.cluster.temi import TEMI
from phyla.cluster.turtle import TURTLE
from phyla.pretrain.frozen import Frozen

__all__ = ["TEMI", "TURTLE", "Frozen"]
