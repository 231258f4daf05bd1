"""A simulated PD cluster that takes its decisions with the servers' own functions.

A request's life: `core.router` places it; its decode server reserves KV (`core.decode`); its
prefill server queues, orders and computes it in chunks (`core.prefill`, with `baselines.orders` for
upstream's policies and
`policy.urgency` for Kairos'); its KV crosses the wire; it joins the running batch, which is its
first token; it decodes until its last (`core.decode`, with `policy.packing` for Kairos).
`core.cluster` wires the servers to one `core.clock`, `hardware.times` says how long steps take
(`hardware.systems` and `hardware.tables`: of which model and GPU), `core.predictions` what the
servers believe about that. `bound.bound` is what no scheduler could exceed. `cli.grid` runs many
simulations in processes; `cli.compare` and `cli.plan` are the two commands.
"""
