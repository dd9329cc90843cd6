"""A report on exported folders: one HTML page, and model cards with measured figures."""

import sys

from sparseport import PublicPackage

sys.modules[__name__].__class__ = PublicPackage
