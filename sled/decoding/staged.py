"""Decoding with a model that is cut over stages: EE-LLM's pipeline-based inference (arXiv 2312.04916, section 4).

At every step of the clock each stage runs its layers on one token of every row, and hands it to the next. At the end of
a stage that is an exit, the policy decides: where the token leaves, the row's next token is known, and the first stage
begins it at the very next step, while the later stages go on with the one that left, for its K/V. So they are exact, a
row's latency for a token is that of the stages up to its exit, and no row waits for another. As tokens of a row follow
each other through the stages in their order, each finds the K/V of all before it.

Without exits a row has one token on its way, and a stage is idle in all but one of S steps.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sled.decoding.batch import Batch
from sled.decoding.groups import fetched
from sled.decoding.loop import write_tokens
from sled.decoding.memory import naming_shortage, refuse_too_large
from sled.decoding.need import deciding_logits
from sled.decoding.network import KV, NOWHERE, Build
from sled.decoding.options import Decoding
from sled.decoding.programs import bounded, forget_programs
from sled.decoding.readout import Readout
from sled.decoding.sampling import choose, position_keys, processed_logits, seen_tokens
from sled.decoding.segments import Context
from sled.decoding.state import PREFILL_BLOCK, Plan, Text, bucket, group, new_text
from sled.errors import SettingError
from sled.exits.policy import ExitView
from sled.timing import Stopwatch

STAGE = "stage"


@group
class Flight:
    """The token of each row that is about to come to a stage, [S, B, ...] over the stages; the first takes new ones.

    h: hidden state below the stage. kept: those of earlier layers that a decision may look at (`_kept`). position:
    NOWHERE where there is none. decided: whether the row's next token is known already.
    """

    h_SBD: jax.Array
    kept_SBND: jax.Array
    position_SB: jax.Array
    decided_SB: jax.Array


@group
class StagedState:
    """What the loop carries. begun_B: positions that the first stage has begun. caches: of a stage's layers, K and V
    with the stages in front. steps_B: of the clock, as far as the row was unfinished."""

    text: Text
    begun_B: jax.Array
    steps_B: jax.Array
    caches: list[KV]
    flight: Flight


def check_staged(plan: Plan, decoding: Decoding, build: Build) -> None:
    """Raises SettingError for what a pipeline cannot do, and for exits that are no ends of stages."""
    exits, name = decoding.exits, type(decoding.exits).__name__
    stages, depth = build.mesh.shape[STAGE], build.outline.num_layers
    ends = tuple(depth // stages * (s + 1) for s in range(stages))
    if exits.verifies or exits.propagates or jax.tree.leaves(exits.initial_memory(1)):
        raise SettingError(f"exits is {name}, which " + (
            "verifies drafts" if exits.verifies else "makes K/V from the exit's hidden state" if exits.propagates else
            "keeps a memory of its own") + "; over the stages of a pipeline tokens are trusted, with exact K/V: give "
            "EarlyExit(..., kv='exact'), or load the model without stages")
    if wrong := [layer for layer in plan.exits if layer not in ends]:
        raise SettingError(f"{name} leaves after layer {wrong[0]}, but the stages end after layers "
                           f"{', '.join(map(str, ends))}; a token leaves where a stage ends: give some of those")


def _kept(plan: Plan) -> tuple[int, ...]:
    """The hidden states that travel with a token: those that a decision looks at."""
    return tuple(sorted(set(itertools.chain(*(plan.decisive_layers(s) for s in range(len(plan.exits)))))))


class StagedGeneration(Batch):
    """One batch of prompts over stages, as `Generation` is one over groups of devices, or on one device. Its schedule
    counts for nothing: later stages always follow at the next step."""

    def __init__(self, build: Build, params: Any, prompts: list[np.ndarray], decoding: Decoding, *, limits: list[int],
                 seeds: list[int], stop_ids: tuple[int, ...]):
        super().__init__(build, params, decoding, stop_ids=stop_ids)
        check_staged(self._plan, decoding, build)
        forget_programs()
        lengths = np.array([len(p) for p in prompts])
        self._ends = lengths + limits
        watch = Stopwatch()
        self._start_all(prompts, seeds, lengths)
        self._fetch()
        self.prefill_seconds, self.compile_seconds = watch.read()
        self.decode_seconds = 0.0

    @naming_shortage("the prompts of a batch")
    def _start_all(self, prompts, seeds, lengths) -> None:
        tokens_BS = np.zeros((len(prompts), bucket(int(self._ends.max()))), np.int32)
        for row, prompt in zip(tokens_BS, prompts, strict=True):
            row[:len(prompt)] = prompt
        block = bucket(min(int(lengths.max()), PREFILL_BLOCK))
        refuse_too_large(self._build, block, len(_kept(self._plan)), (), rows=len(prompts),
                         capacity=tokens_BS.shape[1])
        self._state = _begin(self._build, self._params, tokens_BS, lengths.astype(np.int32),
                             self._ends.astype(np.int32), np.asarray(seeds, np.uint32),
                             np.int32(-(-(int(lengths.max()) - 1) // block)), plan=self._plan, block=block)

    def stop(self, rows: list[int]) -> None:
        self.active[rows] = False
        self._state = _set_active(self._build, self._state, self.active)

    def advance(self, count: int | None = None) -> None:
        """As `Generation.advance`."""
        watch = Stopwatch()
        most = int(self._ends.max())  # `count` may be more than an int32 holds
        goal_B = self._ends if count is None else np.minimum(self._ends, self.lengths + min(count, most))
        if (self.active & (self.lengths < goal_B)).any():
            self._run(goal_B.astype(np.int32))
        seconds, compiled = watch.read()
        self.decode_seconds += seconds
        self.compile_seconds += compiled

    @naming_shortage("decoding a batch")
    def _run(self, goal_B) -> None:
        now = self._decoding
        self._state = _decode(self._build, self._params, self._state, now.exits, now.fusion, now.sampling,
                              self._stop_ids, goal_B)
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

    state = StagedState(text=P(), begun_B=P(), steps_B=P(), caches=P(STAGE), flight=P(STAGE))
    return jax.shard_map(on_stage, mesh=mesh, in_specs=(own, *specs), out_specs=state, axis_names={STAGE},
                         check_vma=False)(params, *arrays)


def _handed(tree, stages: int):
    """What the stage below hands over."""
    return jax.tree.map(lambda x: jax.lax.ppermute(x, STAGE, [(s, s + 1) for s in range(stages - 1)]), tree)


@bounded(rows=None, static=("plan", "block"))
def _begin(build: Build, params, tokens_BS, length_B, limit_B, seeds_B, blocks, *, plan: Plan, block: int):
    """A state with the prompts' K/V: blocks of their tokens follow each other through the stages."""
    mesh = build.mesh
    stages, per = mesh.shape[STAGE], build.outline.num_layers // mesh.shape[STAGE]

    def on_stage(stage, params, tokens_BS, length_B, limit_B, seeds_B, blocks):
        network, (batch, slots) = build(params), tokens_BS.shape
        caches = network.empty_caches(batch, slots, block - 1)[:per]
        h_BTD = network.embed(tokens_BS[:, :1], tokens_BS[:, :1])
        handed_BTD = jnp.zeros((batch, block, h_BTD.shape[-1]), h_BTD.dtype)

        def turn(t, carry):
            handed_BTD, caches = carry
            positions_T = (t - stage) * block + jnp.arange(block)
            here_BT = (positions_T >= 0) & (positions_T < length_B[:, None] - 1)
            positions_BT = jnp.where(here_BT, positions_T, NOWHERE)
            tokens_BT = jnp.take(tokens_BS, positions_T, axis=1, mode="clip")
            h_BTD = jnp.where(stage == 0, network.embed(tokens_BT, positions_BT), handed_BTD)
            states, caches = network.run_layers(h_BTD, positions_BT, caches, 0, per)
            return _handed(states[-1], stages), caches

        _, caches = jax.lax.fori_loop(0, blocks + stages - 1, turn, (handed_BTD, caches))
        nothing = Flight(
            h_SBD=jnp.zeros_like(handed_BTD[:, 0])[None],
            kept_SBND=jnp.zeros((1, batch, len(_kept(plan)), h_BTD.shape[-1]), h_BTD.dtype),
            position_SB=jnp.full((1, batch), NOWHERE), decided_SB=jnp.zeros((1, batch), bool))
        return StagedState(text=new_text(tokens_BS, length_B, limit_B, seeds_B), begun_B=length_B - 1,
                           steps_B=jnp.zeros_like(length_B), caches=jax.tree.map(lambda x: x[None], caches),
                           flight=nothing)

    return _over_stages(on_stage, mesh, params, tokens_BS, length_B, limit_B, seeds_B, blocks, specs=[P()] * 5)


@bounded(rows=None, donate="state")
def _set_active(build: Build, state: StagedState, active_B) -> StagedState:
    return state.replace(text=state.text.replace(active_B=active_B))


@bounded(rows=None, donate="state")
def _decode(build: Build, params, state: StagedState, policy, fusion, sampling, stop_ids, pause_len_B) -> StagedState:
    """Further tokens for every active row, until each has `pause_len_B` or has ended."""
    mesh = build.mesh
    stages, depth = mesh.shape[STAGE], build.outline.num_layers
    per, plan = depth // stages, Plan.of(policy, fusion, build.outline)
    kept = _kept(plan)

    def on_stage(stage, params, state, policy, fusion, sampling, stop_ids, pause_len_B):
        network = build(params)
        readout = Readout(network)
        run = Context(readout, plan, policy, fusion, sampling,
                      position_keys(sampling, state.text.keys_B, state.text.tokens_BS.shape[1]), stop_ids,
                      jnp.minimum(state.text.limit_B, pause_len_B), policy.prepare(readout))

        def unfinished_B(text):
            return text.active_B & (text.length_B < run.pause_len_B)

        def decide(s: int, text, here_B, h_BD, kept_BND):
            """Rows that leave at the end of stage s, with their logits, and the number of the exit."""
            layer = per * (s + 1)
            wide = readout.head(depth).dtype(h_BD)
            if layer not in plan.exits:
                nothing_BV = jnp.zeros((len(here_B), network.shared_head.vocabulary), wide)
                return jnp.zeros_like(here_B), nothing_BV, jnp.int32(0)
            states, e = {n: kept_BND[:, i] for i, n in enumerate(kept)}, plan.exits.index(layer)
            if layer == depth:
                return here_B, deciding_logits(run, states, here_B, jnp.arange(len(here_B))).astype(wide), jnp.int32(e)
            decision = policy.at_exit(ExitView(
                index=e, layer=layer, here_B=here_B, states=states,
                fused_logits=lambda: readout.fuse(fusion, states, layer),
                emitted_B=text.length_B - text.prompt_B, most_B=text.limit_B - text.prompt_B,
                unverified_B=jnp.zeros_like(text.length_B), memory=(), prepared=run.prepared))
            return here_B & decision.leaves_B, decision.logits_BV.astype(wide), jnp.int32(e)

        def step(state: StagedState) -> StagedState:
            text, flight = state.text, jax.tree.map(lambda x: x[0], state.flight)
            ready_B = unfinished_B(text) & (state.begun_B < text.length_B)
            new_B = jnp.where(ready_B, text.length_B - 1, NOWHERE)
            position_B = jnp.where(stage == 0, new_B, flight.position_SB)
            decided_B = flight.decided_SB & (stage > 0)
            h_BD = jnp.where(stage == 0, network.embed(text.newest_B[:, None], new_B[:, None])[:, 0], flight.h_SBD)
            states, caches = network.run_layers(h_BD[:, None], position_B[:, None],
                                                jax.tree.map(lambda x: x[0], state.caches), 0, per)
            own_nBD = jnp.stack([h_BD, *(h[:, 0] for h in states)])  # of layers stage * per and the next
            kept_BND = flight.kept_SBND
            for i, n in enumerate(kept):
                at = n - stage * per
                mine = (at > 0) & (at <= per) | (at == 0) & (stage == 0)
                kept_BND = kept_BND.at[:, i].set(jnp.where(mine, own_nBD[jnp.clip(at, 0, per)], kept_BND[:, i]))

            here_B = text.active_B & (position_B >= 0) & ~decided_B
            leaves_B, logits_BV, exit_of = jax.lax.switch(
                stage, [functools.partial(decide, s) for s in range(stages)], text, here_B, own_nBD[-1], kept_BND)
            seen = lambda: seen_tokens(text.tokens_BS, text.length_B, logits_BV.shape[-1])  # noqa: E731
            token_B = choose(processed_logits(logits_BV, seen, sampling), sampling, run.key_data_BS, text.length_B)
            # Of a row one stage at most has a token that is not decided: the sum is that stage's.
            token_B, exit_B, rows_B = jax.lax.psum(
                (jnp.where(leaves_B, token_B, 0), jnp.where(leaves_B, exit_of, 0), leaves_B.astype(jnp.int32)), STAGE)
            flight = Flight(h_SBD=own_nBD[-1], kept_SBND=kept_BND, position_SB=position_B,
                            decided_SB=decided_B | leaves_B)
            return StagedState(
                text=write_tokens(text, rows_B > 0, token_B, exit_B, plan.last_exit, run.ends_B),
                begun_B=jnp.where(ready_B, text.length_B, state.begun_B),
                steps_B=state.steps_B + unfinished_B(text),
                caches=jax.tree.map(lambda x: x[None], caches),
                flight=jax.tree.map(lambda x: x[None], _handed(flight, stages).replace(
                    position_SB=_handed(flight.position_SB + 1, stages) - 1)))  # a stage that gets none gets 0: NOWHERE

        return jax.lax.while_loop(lambda state: unfinished_B(state.text).any(), step, state)

    given = StagedState(text=P(), begun_B=P(), steps_B=P(), caches=P(STAGE), flight=P(STAGE))
    return _over_stages(on_stage, mesh, params, state, policy, fusion, sampling, stop_ids, pause_len_B,
                        specs=[given, P(), P(), P(), P(), P()])
