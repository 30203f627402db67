"""Layer fusion: how the layers' hidden states become one distribution over the next token.

`FUSIONS` registers the methods that the library has, by the command's words; `sled` and the command take them from it.
"""

from sled.fusion.average import LayerAverage
from sled.fusion.confident import ConfidentDecoding
from sled.fusion.dola import DoLa
from sled.fusion.final import FinalLayer
from sled.fusion.projection import SharedHead, default_tile, fused_logits
from sled.fusion.sled import SLED, ClampOnly
from sled.fusion.statistics import LayerStatistics, layer_statistics
from sled.fusion.strategy import Strategy

FUSIONS = {"final": FinalLayer, "sled": SLED, "dola": DoLa, "confident": ConfidentDecoding, "average": LayerAverage,
           "clamp": ClampOnly}

__all__ = [
    "FUSIONS",
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
