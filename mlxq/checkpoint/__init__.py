"""From bytes on disk to named tensors, read lazily: `source.open_checkpoint` is the way in."""
