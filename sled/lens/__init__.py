"""The lens: what every layer would say after each token of a text, as arrays, a table, a picture, a page."""

from sled.lens.html import page
from sled.lens.lens import Lens
from sled.lens.plot import picture

__all__ = ["Lens", "page", "picture"]
