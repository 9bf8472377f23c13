"""The only folder that sees true labels."""
