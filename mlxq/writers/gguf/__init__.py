"""Writing GGUF files."""
