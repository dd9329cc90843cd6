"""Files in: one module per checkpoint dialect, each read strictly and one tensor at a time."""
