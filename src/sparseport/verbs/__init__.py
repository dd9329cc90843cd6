"""Verbs of the command line that have a module of their own: their options, what they run and how it is printed."""
