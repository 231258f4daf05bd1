"""Connects Kairos to SGLang: the only package that touches SGLang's internals.

Where to find what:

    seams.table             which SGLang functions Kairos wraps, and why
    plugin                  installs the seams in every SGLang process
    hooks                   the handlers: they ask `sglang_kairos.policy` what to do, and do it
    hooks.lifecycle, http   the start of a scheduler, and of the HTTP server
    state.scheduler_state   what one scheduler process knows
    survey, judge           whether this SGLang is a known one, and what changed if not
"""
