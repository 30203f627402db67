"""Self-speculation: the first layers guess, the whole model verifies, nothing is lost.

Elhoushi et al., "LayerSkip", ACL 2024 (arXiv 2404.16710); stopping below a confidence as in Zhang et
al., "Draft & Verify", ACL 2024 (arXiv 2309.08168); the choice of draft length and exit by expected
tokens per layer as in Entezari Zarch et al., "DEL", 2025 (arXiv 2504.05598).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sled.errors import SettingError
from sled.exits.policy import Exits, with_last
from sled.exits.schedule import Lockstep
from sled.fusion.projection import SharedHead
from sled.settings.decorator import settings
from sled.settings.field import bound_of, setting
from sled.settings.rules import Flag, Number, Whole, is_array

KEEP = 0.95  # how much of the acceptance seen so far is kept at each verification (DEL)
PRIOR = (3.0, 4.0)  # accepted and judged drafts before any was seen


@settings
class SelfSpeculation:
    """Tokens are guessed after `layer` and verified by all layers together, as one block.

    The text is the one that plain decoding with the same fusion, sampling and seed gives, token for
    token: when sampling, guess and verification take the same random numbers (Gumbel-max coupling,
    Daliri et al. 2024, arXiv 2408.07978), so a guess is right when both choose alike, and a wrong one is
    replaced by what plain decoding would have drawn. Rows of a batch keep prefixes of different length.

    A draft is made through the exit's own head where the model has one.
    """

    layer: int | tuple[int, ...] = setting(Exits(), help="layer after which to draft; several with adaptive")
    draft: int = setting(Whole(1, hint="6 is usual"), default=6, rows="B",
                         help="how many tokens are drafted before they are verified")
    confidence: float = setting(Number(0, 1, hint="0 never stops a draft"), default=0.0, rows="B",
                                help="stop drafting at a token less probable than this")
    adaptive: bool = setting(Flag(hint="True chooses what promises most accepted tokens per layer run"), default=False,
                             help=("whether each row chooses the length of its draft, up to draft, and its layer, by "
                                   "what was accepted so far"))
    vocabulary: jax.Array | None = setting(default=None, traced=True, help=(
        "token ids [V'] to draft from, None being all; a small set makes drafting cheaper where the projection is a "
        "large part of it"))
    max_draft: int | None = bound_of("draft", least=8)

    verifies = True
    propagates = False
    schedule = Lockstep()  # a verification that does not wait for the others' drafts cuts them short

    def __post_init__(self):
        if self.vocabulary is not None:
            ids = self.vocabulary if is_array(self.vocabulary) else np.asarray(self.vocabulary)
            if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
                raise SettingError(f"SelfSpeculation.vocabulary is {self.vocabulary!r}, but must be a list of token "
                                   "ids; None guesses from all")
            object.__setattr__(self, "vocabulary", ids)
        if len(self.layer) > 1 and not self.adaptive:
            raise SettingError(f"SelfSpeculation.layer is {self.layer}, but only adaptive=True chooses among several; "
                               "give one layer, or adaptive=True")

    @property
    def window(self) -> int:
        return self.max_draft + 1

    @property
    def positions_per_token(self):
        """Where every guess is wrong: the draft, and the token it began with."""
        return self.draft + 1

    def exits(self, num_layers: int) -> tuple[int, ...]:
        return with_last("SelfSpeculation.layer", self.layer, num_layers)

    def prepare(self, network) -> Guesser:
        """What guessing needs of a network, taken from it once, outside the loop."""
        w_VD = network.head_weight
        rows = lambda w_VD: SharedHead(w_VD if self.vocabulary is None else w_VD[self.vocabulary])  # noqa: E731
        shared, exits = rows(w_VD), [network.exit_head(n) for n in self.layer]
        heads = tuple(shared if exit is None or exit.projection is None else rows(exit.projection) for exit in exits)
        return Guesser(heads, self.vocabulary, w_VD.shape[0], network.num_layers)


@dataclasses.dataclass(frozen=True)
class Guesser:
    """The projection for the guesses of each exit, the shared one or its own: all rows, or the draft vocabulary's."""

    heads: tuple[SharedHead, ...]
    ids: jax.Array | None
    vocabulary: int
    depth: int

    def project(self, h_BD, exit_index: int):
        """Logits [B, V] of hidden states made ready by the exit; -inf for tokens outside the draft vocabulary."""
        logits_BV = self.heads[exit_index].project(h_BD)
        if self.ids is None:
            return logits_BV
        everything = jnp.full((h_BD.shape[0], self.vocabulary), -jnp.inf, logits_BV.dtype)
        return everything.at[:, self.ids].set(logits_BV)

    @property
    def head_layers(self) -> float:
        """What the projection costs, in layers: its weights over the 12 D^2 of a usual layer."""
        rows, width = self.heads[0].w_VD.shape
        return rows / (12 * width)


def choose_draft(policy: SelfSpeculation, guesser: Guesser, accepted_BE, judged_BE):
    """The exit (an index) where each row guesses, and how many tokens it guesses: both [B].

    With `adaptive`, the pair that promises most accepted tokens per layer run (DEL's TPL, with this loop's
    costs: d guesses after layer e, one more pass through it, and the other layers once).
    """
    batch = accepted_BE.shape[0]
    most_B = jnp.broadcast_to(jnp.asarray(policy.draft), (batch,))
    if not policy.adaptive:
        return jnp.zeros(batch, jnp.int32), most_B
    exits = len(policy.layer)
    rate_BE1 = ((accepted_BE + PRIOR[0]) / (judged_BE + PRIOR[1]))[:, :exits, None]
    drafts_N = jnp.arange(1, policy.max_draft + 1)
    expected_BEN = 1 + jnp.cumsum(rate_BE1 ** drafts_N, axis=-1)
    layers_E1 = jnp.array(policy.layer)[:, None]
    cost_EN = (drafts_N + 1) * layers_E1 + guesser.depth - layers_E1 + (drafts_N + 1) * guesser.head_layers
    worth_BEN = jnp.where(drafts_N <= most_B[:, None, None], expected_BEN / cost_EN, 0)
    best_B = worth_BEN.reshape(batch, -1).argmax(-1)
    return best_B // policy.max_draft, 1 + best_B % policy.max_draft
