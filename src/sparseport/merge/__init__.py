"""Merging rules: pure functions from base weight and adapter to merged weight."""
