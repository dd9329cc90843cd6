"""Proof: bits and numbers of a written folder, and the certificate that records them."""

import sys

from sparseport import PublicPackage

sys.modules[__name__].__class__ = PublicPackage
