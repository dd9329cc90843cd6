"""The README.md of an exported folder, and what it shares with the report: facts, words, and how to load the model."""
