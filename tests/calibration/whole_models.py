"""A model with all its weights in memory, with which passes over its blocks are compared."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxq.architectures.parameters import ParameterMap
from mlxq.runtime.layers import install_layers
from mlxq.runtime.weights import load_parameters


def whole_model(parameters: ParameterMap) -> nn.Module:
    model = parameters.new_model()
    install_layers(model, parameters.tensors)
    load_parameters(model, "", parameters, compute_dtype=mx.float32)
    return model
