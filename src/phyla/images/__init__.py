"""Pixels, never labels: where images come from, the views made of them, and the batches they come in."""
