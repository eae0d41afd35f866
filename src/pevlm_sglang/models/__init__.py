"""Models that SGLang lacks, in the form of its external packages: one module a model, with
``EntryClass``. :mod:`pevlm_sglang.external` puts them into SGLang's registries."""
