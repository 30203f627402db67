"""Lenses of random numbers, whose tokens have names to stumble over; and how well two colours can be told apart."""

import numpy as np

from sled.lens.lens import BEST, Lens

ODD = ["plain", "<b>&amp;\"'", "</script><!--<script>", "\n\n", "\t", " a", "", "\x1b[31m\x00", "\u202eevil",
       "שלום", "\u0301", "e\u0301", "<0xE2>", "âĢ", "w" * 80, "\u200b", "😀", "\u00a0", "日本語", "\ud800", "${title}",
       "\u2028"]
LAYERS, TOKENS = 5, 30


def made(tokens=TOKENS, layers=LAYERS, *, fusion="SLED") -> Lens:
    """A lens of random numbers, whose tokens have names to stumble over; layers agree often, probabilities spread."""
    random = np.random.RandomState(3)
    shape = (layers + 1, tokens)
    probability = -np.sort(-random.dirichlet(np.full(8, 0.15), shape), axis=-1)[..., :BEST].astype(np.float32)
    best = np.argsort(random.rand(*shape, len(ODD)), axis=-1)[..., :BEST]
    best = np.where(random.rand(*shape, 1) < 0.6, best[-1], best)
    of_last = np.where(best[..., 0] == best[-1, :, 0], probability[..., 0], 0.01).astype(np.float32)
    fused = best[-1].copy()
    fused[::7] = fused[::7, ::-1]
    return Lens(ids=np.arange(tokens) % len(ODD), best=best, best_probability=probability,
                entropy=random.uniform(0, np.log(len(ODD)), shape).astype(np.float32),
                final_probability=of_last, name_of=dict(enumerate(ODD)), vocabulary=len(ODD), fusion=fusion,
                fused_best=fusion and fused, fused_probability=fusion and probability[-1])


LENS = made()


def contrast(one, other) -> float:
    """WCAG 2's ratio of two sRGB colours, each from 0 to 255."""
    c = np.array([one[:3], other[:3]]) / 255
    dark, light = sorted(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722))
    return (light + 0.05) / (dark + 0.05)
