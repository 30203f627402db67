"""Layer fusion: how the layers' hidden states become one distribution over the next token."""

from sled.fusion.average import LayerAverage
from sled.fusion.confident import ConfidentDecoding
from sled.fusion.dola import DoLa
from sled.fusion.final import FinalLayer
from sled.fusion.projection import SharedHead, default_tile, fused_logits
from sled.fusion.sled import SLED, ClampOnly
from sled.fusion.statistics import LayerStatistics, layer_statistics
from sled.fusion.strategy import Strategy

__all__ = [
    "SLED",
    "ClampOnly",
    "ConfidentDecoding",
    "DoLa",
    "FinalLayer",
    "LayerAverage",
    "LayerStatistics",
    "SharedHead",
    "Strategy",
    "default_tile",
    "fused_logits",
    "layer_statistics",
]
