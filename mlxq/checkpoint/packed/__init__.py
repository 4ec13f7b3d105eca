"""Hugging Face checkpoints that another tool has quantized: several stored tensors, one logical one.

`base.Packed` is one logical tensor, `schemes.SCHEMES` says who makes them from which `quant_method`, and
`checkpoint.PackedCheckpoint` shows them as any other source's. Layouts are drawn in `mlxq.formats`.
"""
