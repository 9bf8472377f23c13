"""Embeddings or images in, an assignment out."""
