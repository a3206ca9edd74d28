"""The method: pure tensors, no files, no loops, no processes."""
