"""The lens: what every layer would say after each token of a text."""

from sled.lens.lens import Lens

__all__ = ["Lens"]
