"""The OpenVINO target: IR skeleton, exact constants, tokenizer, folder, and read-back from disk."""
