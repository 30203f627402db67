"""What tests make of a published config.json: the fields that it has, and a model of its shape that fits a test."""

ABSENT = object()  # the value of a field that a file does not have


def whole(values: dict) -> dict:
    """A file's fields, without those that are absent."""
    return {name: value for name, value in values.items() if value is not ABSENT}


def shrunken(values: dict) -> dict:
    """The same file for a model of 3 layers and 64 tokens: how its sizes relate stays as published."""
    c = whole(values)
    if c["model_type"] == "gpt2":
        c |= dict(hidden_size=c.pop("n_embd"), num_attention_heads=c.pop("n_head"), num_hidden_layers=c.pop("n_layer"))
    heads, width = c["num_attention_heads"], c["hidden_size"]
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64)
    if c["model_type"] == "gpt2":
        small["n_inner"] = small.pop("intermediate_size")
    if "num_key_value_heads" in c:
        small["num_key_value_heads"] = 4 if c["num_key_value_heads"] == heads else 2
    if "head_dim" in c:
        small["head_dim"] = 8 if c["head_dim"] * heads == width else 16
    if c.get("sliding_window"):
        small["sliding_window"] = 8
    small |= {name: size for name, size in (("num_local_experts", 4), ("num_experts", 8), ("moe_intermediate_size", 24))
              if name in c}
    if "quantization_config" in c:  # which is of the files alone
        c = {name: value for name, value in c.items() if name != "quantization_config"}
    if c.get("rope_scaling") and "short_factor" in c["rope_scaling"]:
        pairs = int(8 * c.get("partial_rotary_factor", 1)) // 2
        small["rope_scaling"] = {name: value[:pairs] if isinstance(value, list) else value
                                 for name, value in c["rope_scaling"].items()}
    if "layer_types" in c:
        small["layer_types"] = c["layer_types"][:3]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = c.get(name)
        if ids is not None:
            small[name] = [i % 64 for i in ids] if isinstance(ids, list) else ids if ids < 0 else ids % 64
    return {**c, **small}
