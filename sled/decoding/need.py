"""Fusion by need: early layers are projected only for rows whose token the last layer does not decide by itself.

Of a row that takes the most likely token, unchanged by any processor, only the place of the largest logit counts.
Where the fusion proves from the last layer's logits that it cannot move it (`certain` of `sled.fusion.Strategy`), these
stand for the fused ones. The rows that are left are taken in blocks: the fusion may prove the same from the logits of
some early layers (`certain_by_layer`), and else the block is fused.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sled.decoding.sampling import takes_largest
from sled.decoding.segments import Context
from sled.exits.policy import only_if
from sled.fusion import FinalLayer
from sled.settings.per_row import take_rows

# Early logits that a block of rows has at least: fewer take hardly less time, as each block reads the projection anew.
BLOCK_LOGITS = {"cpu": 2**20}
BLOCK_LOGITS_ELSEWHERE = 2**24
BLOCKS = 4  # a block is this part of the rows, or more
LARGE_VOCABULARY = 4096  # from here on a proof by single layers costs little of the projections that it spares


@jax.named_scope("fusion")
def deciding_logits(run: Context, states, wanted_P, row_P) -> jax.Array:
    """Logits [P, V] at P positions of the last layer, from which the same tokens are chosen as from the fusion's.

    states: hidden states [P, D] by layer, at least those that the fusion looks at. wanted_P: positions whose token is
    asked for; of the others the result holds nothing of meaning. row_P: the row that each position belongs to.
    """
    last, readout = run.plan.exits[-1], run.readout
    fusion, early = take_rows(run.fusion, row_P), readout.early_layers(run.fusion, last)
    if not early or not hasattr(fusion, "certain"):
        return readout.fuse(fusion, states, last)
    open_P = wanted_P & takes_largest(take_rows(run.sampling, row_P), row_P.shape[0])
    final_PV = only_if(open_P.any(), lambda: readout.fuse(FinalLayer(), states, last))
    left_P = wanted_P & ~(open_P & fusion.certain(final_PV))
    places, vocabulary = final_PV.shape
    size = block_size(places, (1 + len(early)) * vocabulary)
    by_layer = hasattr(fusion, "certain_by_layer") and vocabulary >= LARGE_VOCABULARY and isinstance(places, int)

    def block(carry):
        left_P, logits_PV = carry
        at_R = jnp.nonzero(left_P, size=size, fill_value=places)[0]  # beyond the last row where fewer are left
        some, final_RV = take_rows(fusion, at_R), final_PV[at_R]
        h_RCD = {n: h_PD[at_R] for n, h_PD in states.items()}
        fused = lambda: readout.fuse(some, h_RCD, last)  # noqa: E731
        if by_layer:
            real_R = at_R < places
            settled_R = readout.certain_by_layer(some, final_RV, h_RCD, last, real_R & open_P[at_R])
            logits_RV = jax.lax.cond((settled_R | ~real_R).all(), lambda: final_RV, fused)
        else:
            logits_RV = fused()
        return left_P.at[at_R].set(False, mode="drop"), logits_PV.at[at_R].set(logits_RV, mode="drop")

    def in_blocks():
        return jax.lax.while_loop(lambda carry: carry[0].any(), block, (left_P, final_PV))[1]

    all_at_once = lambda: readout.fuse(fusion, states, last)  # noqa: E731
    if size == places:
        return in_blocks() if by_layer else jax.lax.cond(left_P.any(), all_at_once, lambda: final_PV)
    return jax.lax.cond(2 * left_P.sum() > places, all_at_once, in_blocks)


def block_size(places, logits_per_place: int) -> int:
    """How many of so many positions are fused at a time; all of them where two blocks would not be fewer.

    All of a symbolic number, too (`jax.export`).
    """
    if not isinstance(places, int):
        return places
    least = BLOCK_LOGITS.get(jax.default_backend(), BLOCK_LOGITS_ELSEWHERE)
    size = max(-(-places // BLOCKS), -(-least // logits_per_place))
    return size if 2 * size <= places else places
