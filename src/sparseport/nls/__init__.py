"""The training core: prune, quantise, fine-tune elastic adapters, and write the files that the exporter reads."""
