"""The small model of the tests of decoding, texts through it without caches, and what these tests see of the loop.

Compiling takes nearly all of the time, so these tests share programs: one model, four prompts as one batch, and a
context that all of it fills. What is compiled anew is another batch size, or a setting that is not traced.
"""

import functools

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import sled
from sled.decoding import loop, state
from sled.decoding.batch import Generation
from sled.lm import LM
from sled.models import Decoder, DecoderConfig
from sled.text.tokenizer import Tokenizer as TextTokenizer

EOS = 5
CAPACITY = 48  # positions of the context, and of the caches wherever a text may fill it
CONFIG = DecoderConfig(family="llama", vocab_size=61, width=32, mlp_width=48, num_layers=4, num_heads=4,
                       num_kv_heads=2, head_dim=8, max_positions=CAPACITY, eos_ids=(EOS,))
PROMPTS = [np.random.default_rng(n).integers(6, 61, size=n).tolist() for n in (1, 3, 17, 9)]
SAMPLED = sled.Sampling(temperature=0.9, top_p=0.95, top_k=30, repetition_penalty=1.1)


def settling(config: DecoderConfig, rate: float) -> Decoder:
    """Random, with deeper layers that change less and less: early layers are right now and then."""
    decoder = Decoder.init(config, rngs=nnx.Rngs(1))
    nnx.update(decoder, jax.tree.map(lambda x: 6 * x if x.ndim == 2 else x, nnx.state(decoder)))
    for n, block in enumerate(decoder.layers):
        for weight in (block.attention.o.weight, block.mlp.down.weight):
            weight[...] = weight[...] * rate**n
    return decoder


@functools.cache
def tiny_lm() -> LM:
    return LM(settling(CONFIG, 0.35))


@functools.cache
def talking_lm() -> LM:
    """The same with a tokenizer: a character for every token, of which the ending one has no text."""
    tokenizer = Tokenizer(models.WordLevel({chr(64 + token): token for token in range(CONFIG.vocab_size)}))
    tokenizer.add_special_tokens([chr(64 + EOS)])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return LM(tiny_lm().build(tiny_lm().params), TextTokenizer(tokenizer, "characters"))


def generate(prompts=PROMPTS, **settings) -> sled.Output:
    """To the end of the context, unless told otherwise."""
    return tiny_lm().generate(prompts, **{"max_new_tokens": CAPACITY, **settings})


def totals(stats) -> tuple:
    """What of a result's statistics is told by its tokens, whatever they were decoded with."""
    return (stats.new_tokens, stats.mean_depth, stats.deferred, stats.drafted, stats.accepted, stats.verifications)


class FullPass:
    """Texts through the whole model at once, without caches: states [L + 1, B, S, D] of every layer and position."""

    def __init__(self, texts):
        lm, tokens_BS = tiny_lm(), np.zeros((len(PROMPTS), CAPACITY), np.int32)
        for row, text in zip(tokens_BS, texts, strict=True):
            row[:len(text)] = text
        self.model = lm.build(lm.params)
        self.states, self._normal = map(np.asarray, _hidden_states(lm.build, lm.params, tokens_BS))

    def logits(self, fusion, layer=CONFIG.num_layers):
        """The fusion's logits [B, S, V] where `layer` speaks last."""
        early = fusion.early_layers(layer, tied=self.model.tied_head)
        picked = [(self._normal if fusion.norm_early else self.states)[n] for n in early]
        h_BSCD = np.stack([*picked, self._normal[layer]], axis=-2)
        flat = _fuse(fusion, h_BSCD.reshape(-1, *h_BSCD.shape[2:]), self.model.shared_head)
        return np.asarray(flat).reshape(*h_BSCD.shape[:2], -1)


@functools.partial(jax.jit, static_argnames="build")
def _hidden_states(build, params, tokens_BS):
    model = build(params)
    states = model.hidden_states(tokens_BS)
    return states, model.normalise(states)


@jax.jit
def _fuse(fusion, h_PCD, head):
    return fusion.logits(h_PCD, head)


def check_endings(out: sled.Output) -> None:
    """Every text of `generate` goes on to an ending token, which stands nowhere else, or to the end of the context."""
    for prompt, tokens, reason in zip(PROMPTS, out.tokens, out.finish_reasons, strict=True):
        assert EOS not in tokens[:-1]
        assert (reason == "eos") == (tokens[-1] == EOS)
        assert reason == "eos" or len(prompt) + len(tokens) == CAPACITY


# The inside of the loop, for the few tests that need it: where its parts are, how often it was compiled, its arguments,
# its state.

START, PUT_ROW, SET_ACTIVE = (f"sled.decoding.state.{name}" for name in ("start", "put_row", "set_active"))
DECODE = "sled.decoding.loop.decode"


def compiled() -> tuple[int, ...]:
    """How many programs there are of the loop, of reading prompts, and of putting a row into a batch."""
    return tuple(sum(f.programs.values()) for f in (loop.decode, state.prefill, state.put_row))


def begin(policy, fusion, schedule=None) -> Generation:
    """The four prompts, read and ready to go on; nothing ends a row but the context."""
    lm = tiny_lm()
    return Generation(lm.build, lm.params, [np.array(p, np.int32) for p in PROMPTS],
                      sled.Decoding(fusion, policy, schedule), limits=[CAPACITY - len(p) for p in PROMPTS],
                      seeds=[0] * len(PROMPTS), stop_ids=())


def decode_without_transfers(policy, fusion, schedule) -> list[int]:
    """The lengths of the rows after the loop ran where nothing may pass between host and device."""
    run = begin(policy, fusion, schedule)
    arguments = run.arguments(np.full(len(PROMPTS), CAPACITY))
    arguments = {name: value if name == "build" else jax.device_put(value) for name, value in arguments.items()}
    with jax.transfer_guard("disallow"):
        after = loop.decode(**arguments)
    return after.text.length_B.tolist()


def check_caches(policy, schedule=None) -> None:
    """The K/V that decoding leaves, as far as each layer is through, are those of a full pass over the same tokens."""
    model = tiny_lm().build(tiny_lm().params)
    at = np.arange(CAPACITY)[None]
    exact = jax.jit(lambda tokens: model.run_layers(model.embed(tokens, at), at, None, 0, 4)[1])
    run = begin(policy, sled.FinalLayer(), schedule)
    run.advance()
    held, exits, kv_len_BE = run._state, (0, *run._plan.exits), np.asarray(run._state.progress.kv_len_BE)
    for b, length in enumerate(held.text.length_B.tolist()):
        through = [int(kv_len_BE[b, s]) for s in range(len(exits) - 1) for _ in range(exits[s], exits[s + 1])]
        assert through[-1] >= length - 1 - run._plan.window
        tokens = np.zeros((1, CAPACITY), np.int32)
        tokens[0, :length] = held.text.tokens_BS[b, :length]
        for ours, theirs, known in zip(held.caches, exact(tokens), through, strict=True):
            for x, y in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(x[b, :, :known], y[0, :, :known], atol=1e-5)
