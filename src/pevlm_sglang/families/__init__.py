"""One folder a model family: where its frames lie, what a video becomes, its processor and models.
:mod:`pevlm_sglang.families.registry` is the one table of them."""
