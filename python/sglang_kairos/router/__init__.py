"""The PD router: picks the pair of servers, carries the SLO to both, relays the answer.

A request's life, file by file:

1. `app` sends it to `request.serving`.
2. `request.context` reads and checks the body, with `request.body` and `slo.body`.
3. `fleet.fleet` reserves a pair of servers (`fleet.policies`, `fleet.reservation`).
4. `request.attempt` makes one attempt on that pair.
5. `request.upstream_stream` talks to both servers and relays decode's answer.
6. `request.sse` cuts the answer into events and measures them.
`fleet.estimators` turns what is observed on the way into the next predictions, `metrics` into numbers.
"""
