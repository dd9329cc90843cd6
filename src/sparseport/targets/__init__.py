"""Weights out: one folder per runtime, each with its writer and a reader that shares no code with it."""
