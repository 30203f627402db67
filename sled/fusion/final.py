"""Plain decoding, as a fusion strategy: the final layer speaks alone."""

from sled.settings.decorator import settings


@settings
class FinalLayer:
    """The final layer alone: the baseline that every other method is compared with."""

    norm_early = False

    def early_layers(self, num_layers: int, *, tied: bool) -> tuple[int, ...]:
        return ()

    def logits(self, h_BCD, head):
        return head.project(h_BCD[:, -1])
