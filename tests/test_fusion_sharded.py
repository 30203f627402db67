"""A projection split over devices: the same numbers, and no device gathers another's rows."""

from programs import on_devices, run_together

PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from sled.fusion import SLED, DoLa, LayerAverage, SharedHead

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
key_h, key_w = jax.random.split(jax.random.key(0))
h_BCD = jax.random.normal(key_h, (2, 5, 16))
w_VD = jax.random.normal(key_w, (8 * 37, 16))
split_VD = jax.device_put(w_VD, NamedSharding(mesh, P("tensor", None)))
whole_BCD = jax.device_put(h_BCD, NamedSharding(mesh, P()))
for strategy in (SLED(), DoLa(), LayerAverage()):
    fuse = jax.jit(lambda s, h, head: s.logits(h, head))
    expected = fuse(strategy, h_BCD, SharedHead(w_VD))
    for tile in (None, 8):
        compiled = fuse.lower(strategy, whole_BCD, SharedHead(split_VD, tile=tile, shards=8)).compile()
        out = compiled(strategy, whole_BCD, SharedHead(split_VD, tile=tile, shards=8))
        np.testing.assert_allclose(np.asarray(out), np.asarray(expected), rtol=1e-4, atol=1e-4)
        if tile is not None:
            gathers = [line for line in compiled.as_text().splitlines() if " all-gather" in line]
            # The projection's width is 16, and nothing else's is: no rows of it may travel.
            assert not [line for line in gathers if ",16]" in line.split(" all-gather")[0]], gathers
"""


def test_split_projection_on_eight_devices():
    run_together([(on_devices(8), ["-c", PROGRAM])])
