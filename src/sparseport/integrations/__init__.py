"""Exported folders in the places that other tools expect them in."""
