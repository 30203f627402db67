"""Self-speculation: the first layers draft, and the whole model verifies.

Elhoushi et al., "LayerSkip", ACL 2024 (arXiv 2404.16710); stopping below a confidence as in Zhang et
al., "Draft & Verify", ACL 2024 (arXiv 2309.08168); the choice of draft length and exit by expected
tokens per layer as in Entezari Zarch et al., "DEL", 2025 (arXiv 2504.05598).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sled.errors import SettingError
from sled.exits.confidence import max_probability
from sled.exits.policy import Decision, Exits, ExitView, Policy, Verification, only_if, with_last
from sled.exits.schedule import Lockstep
from sled.fusion.partial import max_and_index
from sled.fusion.projection import SharedHead
from sled.settings.decorator import bound_of, setting, settings
from sled.settings.rules import Flag, Number, OrNone, Whole, is_array

KEEP = 0.95  # how much of the acceptance seen so far is kept at each verification (DEL)
PRIOR = (3.0, 4.0)  # accepted drafts and all verified ones, before any was seen


@settings
class SelfSpeculation(Policy):
    """The first layers draft, the others verify the drafts as one block: the text stays the same, but for rounding.

    The text is the one that plain decoding with the same fusion, sampling and seed gives: in float32 token for token,
    in a narrower type up to near ties, which a block of drafts may round otherwise (`sled bench exactness`). When
    sampling, draft and verification take the same random numbers (Gumbel-max coupling,
    Daliri et al. 2024, arXiv 2408.07978), so a draft is right when both choose alike, and a wrong one is
    replaced by what plain decoding would have drawn. Rows of a batch keep prefixes of different length.

    A draft is made through the exit's own head where the model has one.
    """

    layer: int | tuple[int, ...] = setting(
        Exits(), option="exit_layers", help="layer after which to draft; several with adaptive")
    draft: int = setting(Whole(1, hint="6 is usual"), default=6, rows="B",
                         help="how many tokens are drafted before they are verified")
    confidence: float = setting(Number(0, 1, hint="0 never stops a draft"), default=0.0, rows="B",
                                option="draft_confidence", help="stop drafting at a token less probable than this")
    adaptive: bool = setting(Flag(hint="the choice is what promises most accepted tokens per layer run"), default=False,
                             help=("whether each row chooses the length of its draft, up to draft, and its layer, by "
                                   "what was accepted so far"))
    vocabulary: jax.Array | None = setting(default=None, traced=True, option=None, help=(
        "token ids [V'] to draft from, None being all; a small set makes drafting cheaper where the projection is a "
        "large part of it"))
    first_ids: int | None = setting(
        OrNone(Whole(1, hint="in vocabularies made by merges the first ids are the most frequent tokens")),
        default=None, option="draft_first_ids",
        help="draft from the first so many token ids alone, cheaper where the projection is a large part of it")
    max_draft: int | None = bound_of("draft", least=8)

    verifies = True
    schedule = Lockstep()  # a verification that does not wait for the others' drafts cuts them short

    def __post_init__(self):
        if self.vocabulary is not None:
            ids = self.vocabulary if is_array(self.vocabulary) else np.asarray(self.vocabulary)
            if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
                raise SettingError(f"SelfSpeculation.vocabulary is {self.vocabulary!r}, but must be a list of token "
                                   "ids; None drafts from all")
            object.__setattr__(self, "vocabulary", ids)
            if self.first_ids is not None:
                raise SettingError(f"SelfSpeculation.first_ids is {self.first_ids}, but vocabulary names the token ids "
                                   "to draft from; give one of the two")
        if len(self.layer) > 1 and not self.adaptive:
            raise SettingError(f"SelfSpeculation.layer is {self.layer}, but only adaptive=True chooses among several; "
                               "give one layer, or adaptive=True")

    @property
    def window(self) -> int:
        return self.max_draft + 1

    @property
    def positions_per_token(self):
        """Where every draft is wrong: their number, and the token they began with."""
        return self.draft + 1

    def exits(self, num_layers: int) -> tuple[int, ...]:
        return with_last("SelfSpeculation.layer", self.layer, num_layers)

    def check(self, network) -> None:
        count = network.shared_head.vocabulary
        if self.first_ids is not None and self.first_ids > count:
            raise SettingError(f"SelfSpeculation.first_ids is {self.first_ids}, but the model has {count} token ids; "
                               "give fewer, or leave it out for all")
        if self.vocabulary is None or isinstance(self.vocabulary, jax.core.Tracer):
            return
        ids, most = np.asarray(self.vocabulary), count - 1
        if (outside := ids[(ids < 0) | (ids > most)]).size:
            raise SettingError(f"SelfSpeculation.vocabulary has the token id {outside[0]}, but the model's are 0 to "
                               f"{most}; leave it out")

    def prepare(self, readout) -> Drafter:
        """The projections of the drafts, the rows of a draft vocabulary taken once."""
        rows = self.first_ids if self.vocabulary is None else self.vocabulary
        heads = tuple(head if rows is None else head.some(rows) for head in map(readout.head, self.layer))
        return Drafter(readout, self.layer, heads, self.vocabulary)

    def initial_memory(self, batch: int):
        """Drafts verified so far at each exit, right ones and all of them, older ones fading; [B, E - 1] each."""
        if not self.adaptive:
            return ()
        none_BE = jnp.zeros((batch, len(self.layer)))
        return Acceptance(none_BE, none_BE)

    def at_exit(self, view: ExitView) -> Decision:
        """Rows that draft at this exit leave with its logits, until their draft is long enough or not sure enough."""
        layer_B, draft_B = self._choose_draft(view.memory, view.prepared, view.here_B.shape[0])
        may_B = view.here_B & (layer_B == view.index) & (view.unverified_B < draft_B)

        def draft():
            logits_BV = view.prepared.logits(view.states, view.index)
            picky = jnp.any(jnp.asarray(self.confidence) > 0)
            sure_B = only_if(picky, lambda: max_probability(logits_BV))
            return ~picky | (sure_B >= self.confidence), logits_BV

        sure_B, logits_BV = only_if(may_B.any(), draft)
        return Decision(may_B & sure_B, logits_BV, view.memory)

    def observe(self, memory, verification: Verification, prepared: Drafter):
        """The acceptance after a verification, of an adaptive policy.

        Places up to and including the first wrong draft count. Where several exits are offered, each is asked what it
        would have drafted there ("shadow tokens" of DEL), its most likely token being its draft.
        """
        if not self.adaptive:
            return memory
        drafted_BT, accepted_B, chosen_BT, _ = verification
        counts_BT = drafted_BT & (jnp.arange(drafted_BT.shape[1]) <= accepted_B[:, None])

        def right_B(e: int, layer: int):
            if len(self.layer) == 1:
                return accepted_B
            drafts = lambda states: max_and_index(prepared.logits(states, e))[1][:, 0]  # noqa: E731
            read = {n: verification.states[n] for n in (prepared.readout.source(layer),)}
            return (counts_BT & (jax.vmap(drafts, 1, 1)(read) == chosen_BT)).sum(1)

        fade_B1 = jnp.where(counts_BT.any(1), KEEP, 1.0)[:, None]
        right_BE = jnp.stack([right_B(e, layer) for e, layer in enumerate(self.layer)], axis=1)
        return Acceptance(fade_B1 * memory.accepted_BE + right_BE,
                          fade_B1 * memory.drafted_BE + counts_BT.sum(1)[:, None])

    def _choose_draft(self, memory, drafter: Drafter, batch: int):
        """The exit (an index) where each row drafts, and the length of its draft: both [B].

        With `adaptive`, the pair that promises most accepted tokens per layer run (DEL's TPL, with this loop's
        costs: d drafts after layer e, one more pass through it, and the other layers once; a head's block is a layer).
        """
        most_B = jnp.broadcast_to(jnp.asarray(self.draft), (batch,))
        if not self.adaptive:
            return jnp.zeros(batch, jnp.int32), most_B
        rate_BE1 = ((memory.accepted_BE + PRIOR[0]) / (memory.drafted_BE + PRIOR[1]))[:, :, None]
        drafts_N = jnp.arange(1, self.max_draft + 1)
        expected_BEN = 1 + jnp.cumsum(rate_BE1 ** drafts_N, axis=-1)
        layers_E1 = jnp.array(self.layer)[:, None]
        own_E1 = jnp.array([drafter.readout.block_head(n) is not None for n in self.layer])[:, None]
        cost_EN = (drafts_N + 1) * (layers_E1 + own_E1 + drafter.head_layers) + drafter.depth - layers_E1
        worth_BEN = jnp.where(drafts_N <= most_B[:, None, None], expected_BEN / cost_EN, 0)
        best_B = worth_BEN.reshape(batch, -1).argmax(-1)
        return best_B // self.max_draft, 1 + best_B % self.max_draft


class Acceptance(NamedTuple):
    """Drafts that were right at each exit, and all that were verified, [B, exits] each; older ones fade."""

    accepted_BE: jax.Array
    drafted_BE: jax.Array


class Drafter(NamedTuple):
    """What drafting takes from the network. heads: each exit's projection, all rows or the draft vocabulary's."""

    readout: Any
    layers: tuple[int, ...]
    heads: tuple[SharedHead, ...]
    ids: jax.Array | None

    def logits(self, states, exit_index: int):
        """An exit's logits [B, V] of hidden states [B, D] by number, without fusion; -inf outside the draft vocabulary.
        """
        layer = self.layers[exit_index]
        logits_BV = self.heads[exit_index].project(self.readout.pre_logits(states, layer))
        whole = self.readout.head(layer).vocabulary
        if self.ids is None and logits_BV.shape[1] == whole:
            return logits_BV
        if self.ids is None:
            return jnp.pad(logits_BV, ((0, 0), (0, whole - logits_BV.shape[1])), constant_values=-jnp.inf)
        return jnp.full((logits_BV.shape[0], whole), -jnp.inf, logits_BV.dtype).at[:, self.ids].set(logits_BV)

    @property
    def depth(self) -> int:
        return self.readout.num_layers

    @property
    def head_layers(self) -> float:
        """The cost of the projection, in layers: its weights over the 12 D^2 of a usual layer."""
        rows, width = self.heads[0].w_VD.shape
        return rows / (12 * width)
