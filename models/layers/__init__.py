"""The layers of a decoder: one file per kind of part, and the block that puts them together."""

from sled.models.layers.attention import KV, LayerContext, empty_cache, traced_windows
from sled.models.layers.basic import Embedding, LayerNorm, Linear, RMSNorm, norm_of, parameter
from sled.models.layers.block import Block
from sled.models.layers.experts import Routing
from sled.models.layers.mlp import MLP

__all__ = ["KV", "MLP", "Block", "Embedding", "LayerContext", "LayerNorm", "Linear", "RMSNorm", "Routing",
           "empty_cache", "norm_of", "parameter", "traced_windows"]
