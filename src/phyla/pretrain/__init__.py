"""Images in, an encoder out."""
