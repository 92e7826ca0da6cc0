"""A trained model as one plain model: merged, written, read back and compared."""
