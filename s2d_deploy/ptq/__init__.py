"""Post-training quantization recipes: one pass a file, one line each in `passes.PASSES`."""
