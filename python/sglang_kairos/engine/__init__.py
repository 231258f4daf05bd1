"""The SGLang glue: the only folder that touches upstream's internals.

`seams` says which upstream functions Kairos wraps and why, `plugin` installs them, `state` holds what
one scheduler process knows, `prefill` and `decode` ask `sglang_kairos.policy` what to do and do it.
"""
