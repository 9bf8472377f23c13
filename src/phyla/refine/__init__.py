"""An assignment in, a better assignment out."""
