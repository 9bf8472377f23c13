"""Modules that know no method: encoders, heads, memory."""
