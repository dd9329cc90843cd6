"""A report on exported folders: one HTML page, and model cards with measured figures.

gather         what is on disk, as plain data; bench_file, naive_file and search_section read the other files
page           the sections put together, and page.css
make, card     the report itself, and model cards written anew
"""
