"""A report on exported folders: one HTML page, and model cards with measured figures."""
