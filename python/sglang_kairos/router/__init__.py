"""The PD router: picks the pair of servers, carries the SLO to both, relays the answer.

A request's life: `app` routes it to `request.serving`, which reads the body, checks its SLO
(`slo.body`) and describes it (`request.body`); `fleet.fleet` picks a pair (`policy.placement`) from
what this router has sent and what the servers report; `request.upstream_stream` talks to both
servers;
`request.serving` relays decode's answer.
`fleet.estimators` turns what is observed on the way into the next predictions, `metrics` into numbers.
"""
