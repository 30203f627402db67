"""Decoding with a model that is cut over stages: EE-LLM's pipeline-based inference (arXiv 2312.04916, section 4).

At every step of the clock each stage runs its layers on one token of every row of a batch, and hands it on. At the end
of a stage that is an exit, the policy decides: where the token leaves, the row's next token is known, and the first
stage may begin it at the very next step, while the later stages go on with the one that left, for its K/V. So they are
exact, and with one batch a row waits for a token as long as the stages up to its exit take, and for no other row. As
tokens of a row follow each other through the stages in their order, each finds the K/V of all before it.

One batch whose tokens do not leave early keeps one stage at work at a time. So several may follow each other, called
microbatches. They take turns at the first stage: next is the one with the largest share of its unfinished rows ready,
of equal ones the next in number behind the one that went last. With as many as there are stages all have work, and a
row whose token left early waits until its microbatch's next turn.

Axes beside the usual ones: S stages, M microbatches, R rows of one; B = M R, those of the first microbatch first.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sled.decoding.batch import Generation
from sled.decoding.groups import fetched
from sled.decoding.loop import write_tokens
from sled.decoding.memory import naming_shortage, refuse_too_large
from sled.decoding.need import deciding_logits
from sled.decoding.network import KV, NOWHERE, Build
from sled.decoding.options import Decoding
from sled.decoding.programs import bounded
from sled.decoding.readout import Readout
from sled.decoding.sampling import choose, position_keys, processed_logits, seen_tokens
from sled.decoding.segments import Context
from sled.decoding.state import PREFILL_BLOCK, Plan, Text, bucket, group, new_text, token_rows
from sled.errors import SettingError
from sled.exits.policy import ExitView
from sled.settings.per_row import take_rows

STAGE = "stage"


@group
class Flight:
    """For each stage the tokens that it works on next, all of one microbatch, [S, R, ...]; the first stage, which takes
    new ones, does not look at its own.

    h: hidden state below the stage. kept: those of earlier layers that a decision may look at (`_kept`). position:
    NOWHERE where there is none. decided: whether the row's next token is known already. microbatch: its number.
    """

    h_SRD: jax.Array
    kept_SRND: jax.Array
    position_SR: jax.Array
    decided_SR: jax.Array
    microbatch_S: jax.Array


@group
class StagedState:
    """What the loop carries. turn: the microbatch that is next. begun_B: positions that the first stage has begun.
    caches: of a stage's layers, K and V with the stages in front. steps_B: of the clock, as far as the row was
    unfinished."""

    text: Text
    turn: jax.Array
    begun_B: jax.Array
    steps_B: jax.Array
    caches: list[KV]
    flight: Flight


_SPLIT = StagedState(text=P(), turn=P(), begun_B=P(), steps_B=P(), caches=P(STAGE), flight=P(STAGE))  # over stages


def check_staged(plan: Plan, decoding: Decoding, build: Build) -> None:
    """Raises SettingError for what a pipeline cannot do, and for exits that are no ends of stages."""
    exits, name = decoding.exits, type(decoding.exits).__name__
    stages, depth = build.mesh.shape[STAGE], build.outline.num_layers
    ends = tuple(depth // stages * (s + 1) for s in range(stages))
    if exits.verifies or exits.propagates or jax.tree.leaves(exits.initial_memory(1)):
        raise SettingError(f"exits is {name}, which " + (
            "verifies drafts" if exits.verifies else "makes K/V from the exit's hidden state" if exits.propagates else
            "keeps a memory of its own") + "; over the stages of a pipeline the token that an exit gives is final, and "
            "its K/V are exact: give EarlyExit(...) with kv exact, or load the model without stages")
    if wrong := [layer for layer in plan.exits if layer not in ends]:
        raise SettingError(f"{name} leaves after layer {wrong[0]}, but the stages end after layers "
                           f"{', '.join(map(str, ends))}; a token leaves where a stage ends: give some of those")


def _kept(plan: Plan) -> tuple[int, ...]:
    """The hidden states that travel with a token: those that a decision looks at."""
    return tuple(sorted(set(itertools.chain(*(plan.decisive_layers(s) for s in range(len(plan.exits)))))))


class StagedGeneration(Generation):
    """A `Generation` over stages. Its schedule counts for nothing: later stages always follow at the next step.

    microbatches: how many batches follow each other, of as many rows each.
    """

    _state: StagedState

    def __init__(self, build: Build, params: Any, prompts: list[np.ndarray], decoding: Decoding, *,
                 microbatches: int = 1, **settings):
        self._rows = len(prompts) // microbatches
        super().__init__(build, params, prompts, decoding, **settings)

    @naming_shortage("the prompts of a batch")
    def _begun(self, prompts, seeds) -> StagedState:
        check_staged(self._plan, self._decoding, self._build)
        lengths, capacity = np.array([len(p) for p in prompts], np.int32), bucket(int(self._ends.max()))
        block = bucket(min(int(lengths.max()), PREFILL_BLOCK))
        refuse_too_large(self._build, block, len(_kept(self._plan)), (), rows=len(prompts), capacity=capacity,
                         at_once=self._rows)
        blocks_M = -(-(lengths.reshape(-1, self._rows).max(axis=1) - 1) // block)
        return _begin(self._build, self._params, token_rows(prompts, capacity), lengths, self._ends.astype(np.int32),
                      np.asarray(seeds, np.uint32), blocks_M, plan=self._plan, block=block)

    def stop(self, rows: list[int]) -> None:
        self.active[rows] = False
        self._state = _set_active(self._build, self._state, self.active)

    @naming_shortage("decoding a batch")
    def _go_on(self, goal_B) -> None:
        now = self._decoding
        self._state = _decode(self._build, self._params, self._state, now.exits, now.fusion, now.sampling,
                              self._stop_ids, goal_B.astype(np.int32), rows=self._rows)
        self._fetch()

    @property
    def steps(self) -> list[int]:
        """Steps of the clock that each row took."""
        return fetched(self._state.steps_B).tolist()

    @property
    def held(self) -> int:
        return 0

    def _fetch(self) -> None:
        self._text = fetched(self._state.text.replace(keys_B=None))
        self.lengths, self.active = self._text.length_B, self._text.active_B.copy()


def _over_stages(function, mesh, params, *arrays, specs):
    """`function(stage, params, *arrays)` on each stage with its own layers; results and `specs` name what is split."""
    own = jax.tree_util.tree_map_with_path(lambda path, _: P(STAGE) if path[0].key == "layers" else P(), params)

    def on_stage(params, *arrays):
        layers = jax.tree.map(lambda x: x[0], params["layers"])
        return function(jax.lax.axis_index(STAGE), {**params, "layers": layers}, *arrays)

    return jax.shard_map(on_stage, mesh=mesh, in_specs=(own, *specs), out_specs=_SPLIT, axis_names={STAGE},
                         check_vma=False)(params, *arrays)


def _handed(tree, stages: int):
    """What the stage below hands over."""
    return jax.tree.map(lambda x: jax.lax.ppermute(x, STAGE, [(s, s + 1) for s in range(stages - 1)]), tree)


def _own(tree, microbatch, rows: int):
    """The rows of one microbatch."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, microbatch * rows, rows), tree)


def _with_own(tree, own, microbatch, rows: int):
    """`tree` with these as the rows of one microbatch."""
    return jax.tree.map(lambda x, mine: jax.lax.dynamic_update_slice_in_dim(x, mine, microbatch * rows, 0), tree, own)


@bounded(rows=None, static=("plan", "block"))
def _begin(build: Build, params, tokens_BS, length_B, limit_B, seeds_B, blocks_M, *, plan: Plan, block: int):
    """A state with the prompts' K/V: blocks of their tokens follow each other through the stages, `blocks_M` of them of
    each microbatch."""
    mesh = build.mesh
    stages, per = mesh.shape[STAGE], build.outline.num_layers // mesh.shape[STAGE]
    rows = len(tokens_BS) // len(blocks_M)

    def on_stage(stage, params, tokens_BS, length_B, limit_B, seeds_B, blocks_M):
        network, (batch, slots) = build(params), tokens_BS.shape
        caches = network.empty_caches(batch, slots, block - 1)[:per]
        h_BTD = network.embed(tokens_BS[:, :1], tokens_BS[:, :1])
        handed_RTD = jnp.zeros((rows, block, h_BTD.shape[-1]), h_BTD.dtype)
        ends_M = jnp.cumsum(blocks_M)

        def turn(t, carry):
            handed_RTD, caches = carry
            m = jnp.minimum((t - stage >= ends_M).sum(), len(blocks_M) - 1)
            positions_T = (t - stage - (ends_M - blocks_M)[m]) * block + jnp.arange(block, dtype=jnp.int32)
            tokens_RS, length_R = _own((tokens_BS, length_B), m, rows)
            here_RT = (positions_T >= 0) & (positions_T < length_R[:, None] - 1)
            positions_RT = jnp.where(here_RT, positions_T, NOWHERE)
            tokens_RT = jnp.take(tokens_RS, positions_T, axis=1, mode="clip")
            h_RTD = jnp.where(stage == 0, network.embed(tokens_RT, positions_RT), handed_RTD)
            states, own = network.run_layers(h_RTD, positions_RT, _own(caches, m, rows), 0, per)
            return _handed(states[-1], stages), _with_own(caches, own, m, rows)

        _, caches = jax.lax.fori_loop(0, ends_M[-1] + stages - 1, turn, (handed_RTD, caches))
        empty = Flight(
            h_SRD=jnp.zeros_like(handed_RTD[:, 0])[None],
            kept_SRND=jnp.zeros((1, rows, len(_kept(plan)), h_BTD.shape[-1]), h_BTD.dtype),
            position_SR=jnp.full((1, rows), NOWHERE, jnp.int32), decided_SR=jnp.zeros((1, rows), bool),
            microbatch_S=jnp.zeros(1, jnp.int32))
        return StagedState(text=new_text(tokens_BS, length_B, limit_B, seeds_B), turn=jnp.int32(0),
                           begun_B=length_B - 1, steps_B=jnp.zeros_like(length_B),
                           caches=jax.tree.map(lambda x: x[None], caches), flight=empty)

    return _over_stages(on_stage, mesh, params, tokens_BS, length_B, limit_B, seeds_B, blocks_M, specs=[P()] * 5)


@bounded(rows=None, donate="state")
def _set_active(build: Build, state: StagedState, active_B) -> StagedState:
    return state.replace(text=state.text.replace(active_B=active_B))


@bounded(rows=None, static=("rows",), donate="state")
def _decode(build: Build, params, state: StagedState, policy, fusion, sampling, stop_ids, pause_len_B, *,
            rows: int) -> StagedState:
    """Further tokens for every active row, until each has `pause_len_B` or has ended. rows: of a microbatch."""
    mesh = build.mesh
    stages, depth = mesh.shape[STAGE], build.outline.num_layers
    per, plan = depth // stages, Plan.of(policy, fusion, build.outline)
    kept = _kept(plan)

    def on_stage(stage, params, state, policy, fusion, sampling, stop_ids, pause_len_B):
        network = build(params)
        readout = Readout(network)
        all_rows = Context(readout, plan, policy, fusion, sampling,
                           position_keys(sampling, state.text.keys_B, state.text.tokens_BS.shape[1]), stop_ids,
                           jnp.minimum(state.text.limit_B, pause_len_B), policy.prepare(readout))

        def unfinished_B(text):
            return text.active_B & (text.length_B < all_rows.pause_len_B)

        def of_microbatch(text, m) -> tuple[Text, Context]:
            """What there is of its rows."""
            at_R, (key_data_RS, pause_len_R) = m * rows + jnp.arange(rows), _own(
                (all_rows.key_data_BS, all_rows.pause_len_B), m, rows)
            run = all_rows._replace(policy=take_rows(policy, at_R), fusion=take_rows(fusion, at_R),
                                    sampling=take_rows(sampling, at_R), key_data_BS=key_data_RS,
                                    pause_len_B=pause_len_R)
            return _own(text.replace(keys_B=None), m, rows), run

        def next_turn(text, ready_B, turn):
            """The microbatch that the first stage takes, where equal ones follow each other from `turn` on."""
            ready_M, unfinished_M = (x_B.reshape(-1, rows).sum(1) for x_B in (ready_B, unfinished_B(text)))
            share_M = ready_M / jnp.maximum(unfinished_M, 1)
            return (turn + jnp.roll(share_M, -turn).argmax().astype(turn.dtype)) % len(share_M)

        def decide(s: int, text, run: Context, here_R, h_RD, kept_RND):
            """Rows that leave at the end of stage s, with their logits, and the number of the exit."""
            layer = per * (s + 1)
            wide = readout.head(depth).dtype(h_RD)
            if layer not in plan.exits:
                nothing_RV = jnp.zeros((rows, network.shared_head.vocabulary), wide)
                return jnp.zeros_like(here_R), nothing_RV, jnp.int32(0)
            states, e = {n: kept_RND[:, i] for i, n in enumerate(kept)}, plan.exits.index(layer)
            if layer == depth:
                return here_R, deciding_logits(run, states, here_R, jnp.arange(rows)).astype(wide), jnp.int32(e)
            decision = run.policy.at_exit(ExitView(
                index=e, layer=layer, here_B=here_R, states=states,
                fused_logits=lambda: readout.fuse(run.fusion, states, layer),
                emitted_B=text.length_B - text.prompt_B, most_B=text.limit_B - text.prompt_B,
                unverified_B=jnp.zeros_like(text.length_B), memory=(), prepared=run.prepared))
            return here_R & decision.leaves_B, decision.logits_BV.astype(wide), jnp.int32(e)

        def step(state: StagedState) -> StagedState:
            flight, caches = jax.tree.map(lambda x: x[0], (state.flight, state.caches))
            ready_B = unfinished_B(state.text) & (state.begun_B < state.text.length_B)
            first = next_turn(state.text, ready_B, state.turn)
            turn = jnp.where(ready_B.any(), (first + 1) % (len(ready_B) // rows), state.turn)
            ready_B &= jnp.arange(len(ready_B)) // rows == first
            m = jnp.where(stage == 0, first, flight.microbatch_S)
            text, run = of_microbatch(state.text, m)
            new_R = jnp.where(_own(ready_B, m, rows), text.length_B - 1, NOWHERE)
            position_R = jnp.where(stage == 0, new_R, flight.position_SR)
            decided_R = flight.decided_SR & (stage > 0)
            h_RD = jnp.where(stage == 0, network.embed(text.newest_B[:, None], new_R[:, None])[:, 0], flight.h_SRD)
            states, own = network.run_layers(h_RD[:, None], position_R[:, None], _own(caches, m, rows), 0, per)
            own_nRD = jnp.stack([h_RD, *(h[:, 0] for h in states)])  # of layers stage * per and the next
            kept_RND = flight.kept_SRND
            for i, n in enumerate(kept):
                at = n - stage * per
                mine = (at > 0) & (at <= per) | (at == 0) & (stage == 0)
                kept_RND = kept_RND.at[:, i].set(jnp.where(mine, own_nRD[jnp.clip(at, 0, per)], kept_RND[:, i]))

            here_R = text.active_B & (position_R >= 0) & ~decided_R
            leaves_R, logits_RV, exit_of = jax.lax.switch(
                stage, [functools.partial(decide, s, text, run) for s in range(stages)], here_R, own_nRD[-1], kept_RND)
            seen = lambda: seen_tokens(text.tokens_BS, text.length_B, logits_RV.shape[-1])  # noqa: E731
            token_R = choose(processed_logits(logits_RV, seen, run.sampling), run.sampling, run.key_data_BS,
                             text.length_B)
            # Of a row one stage at most has a token that is not decided: the sum is that stage's.
            chosen_R = (jnp.where(leaves_R, token_R, 0), jnp.where(leaves_R, exit_of, 0), leaves_R.astype(jnp.int32))
            nothing_B = jax.tree.map(lambda x: jnp.zeros(len(ready_B), x.dtype), chosen_R)
            token_B, exit_B, got_B = jax.lax.psum(_with_own(nothing_B, chosen_R, m, rows), STAGE)
            # A stage that is handed nothing gets zeros: the positions are one too high on the way, 0 is NOWHERE.
            flight = _handed(Flight(h_SRD=own_nRD[-1], kept_SRND=kept_RND, position_SR=position_R - NOWHERE,
                                    decided_SR=decided_R | leaves_R, microbatch_S=m), stages)
            return StagedState(
                text=write_tokens(state.text, got_B > 0, token_B, exit_B, plan.last_exit, run.ends_B),
                turn=turn, begun_B=jnp.where(ready_B, state.text.length_B, state.begun_B),
                steps_B=state.steps_B + unfinished_B(state.text),
                caches=jax.tree.map(lambda x: x[None], _with_own(caches, own, m, rows)),
                flight=jax.tree.map(lambda x: x[None], flight.replace(position_SR=flight.position_SR + NOWHERE)))

        return jax.lax.while_loop(lambda state: unfinished_B(state.text).any(), step, state)

    return _over_stages(on_stage, mesh, params, state, policy, fusion, sampling, stop_ids, pause_len_B,
                        specs=[_SPLIT, P(), P(), P(), P(), P()])
