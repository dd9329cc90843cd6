"""Where sparseport meets other people's tools and services."""
