"""A simulated PD cluster that takes its decisions with the servers' own functions.

A request's life: `router` places it; its decode server reserves KV (`decode`); its prefill server
queues, orders and computes it in chunks (`prefill`, with `orders` for upstream's policies and
`policy.urgency` for Kairos'); its KV crosses the wire; it joins the running batch, which is its
first token; it decodes until its last (`decode`, with `policy.packing` for Kairos).
`cluster` wires the servers to one `clock`, `times` says how long steps take (`systems` and `tables`:
of which model and GPU), `predictions` what the servers believe about that. `bound` is what no
scheduler could exceed. `grid` runs many simulations in processes; `compare` and `plan` are the two
commands.
"""
