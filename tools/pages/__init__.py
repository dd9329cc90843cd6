"""The generated parts of the documentation: `python -m tools.pages` writes them anew (`make pages`).

Each stands between two marks in a page of docs/ whose other text is written by hand. The pages are kept in the
repository, so that they can be read there as well as on the site; tests/docs/test_pages.py fails where one is out of
date.
"""
