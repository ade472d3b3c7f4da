"""How the bundled stand-ins were made: a small CLIP and a small LLaVA of CIFAR's classes, trained from nothing.

No real CLIP or LLaVA can be bundled. `clip`, `tower` and `llava` are the parts of the recipe, `words` and `corpus` what
they learn from, `training` the loop; `claims` reads out of a text what it claims. `scripts/make_tiny_clip.py` and
`scripts/make_tiny_llava.py` run it in full, the appendix on building the stand-ins a part of it.
"""
