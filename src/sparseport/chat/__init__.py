"""Talking to an exported folder on a terminal."""
