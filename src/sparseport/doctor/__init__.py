"""What is installed, what this machine has, and what of it stands in the way.

Nothing here needs a package beyond Python's own: it has to work where others do not.
"""
