"""Whole jobs from a recipe file: from a base model to a proven folder, step by step."""
