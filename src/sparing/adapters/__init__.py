"""The only code that knows transformers: attention and mask functions, the cache, the model's structure.

`attention` and `masks` are what transformers calls, `cache` and `layers` hold keys and values, `structure` reads a
model, `rotary` inverts its position embedding, `attach` puts all of it in place and takes it away again.
"""
