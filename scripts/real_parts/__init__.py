"""Real parts that never saw a CIFAR label: a frozen encoder of ImageNet, a small reader of words, SmolLM2.

`parts` fetches them, `pool` says which open images each step may use, `encoder` turns images into tokens, `wording`
writes the texts, `reader` learns to read them and passes the gate, `smollm` does the same with SmolLM2, `stage1` trains
the compact model. `scripts/make_real_parts.py` builds all of it, `scripts/measure_real_parts.py` measures.
"""
