"""The bundled model and the word problems it was trained on."""

MAX_NEW_TOKENS = 144  # room for every solution

# Exits that pay on the bundled model: settings of `sled.EarlyExit` and of `sled.SelfSpeculation`.
EXIT = {"layers": (2, 4), "threshold": 0.9}
DRAFT = {"layer": 2, "draft": 16}
