"""Simulates a PD cluster, with decisions by the servers' own functions.

A request's life in five steps:
    1. `core.router` places it.
    2. Its decode server reserves KV (`core.decode`).
    3. Its prefill server queues it, orders it and computes it in chunks (`core.prefill`). SGLang's
       policies are in `baselines.orders`, Kairos' in `policy.urgency`.
    4. Its KV crosses the link, and it joins the running batch: that is its first token.
    5. It decodes until its last token (`core.decode`, with `policy.decode_step` for Kairos).

Where to find the rest:
    core.cluster       wires the servers to one `core.clock`
    core.predictions   what the servers predict about their step times
    hardware.times     how long steps really take (`systems`, `tables`: of which model and GPU)
    bound.bound        the share of TTFT targets that no scheduler could exceed
    cli.grid           runs many simulations in processes
    cli.compare, plan  the two commands
"""
