"""A report on exported folders: one HTML page, and model cards with measured figures.

The package can be called like its function (`sparseport.report(folders, output)`): as soon as one of its modules is
imported, Python makes `sparseport.report` the package, for everyone.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from sparseport.report.make import report

        return report(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
