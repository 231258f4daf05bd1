"""Connects Kairos to SGLang: the only package that touches SGLang's internals.

`seams.table` says which upstream functions Kairos wraps and why; `plugin` installs the wrappers.
`state.scheduler_state` holds what one scheduler process knows. `hooks` has the handlers:
- `lifecycle` starts a scheduler;
- `http` puts `slo_middleware` in front of the server's app;
- `prefill` and `decode` ask `sglang_kairos.policy` what to do, and do it.
"""
