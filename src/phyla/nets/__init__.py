"""Modules that know no method: encoders and heads."""
