"""Proof: bits and numbers of a written folder, and the certificate that records them."""
