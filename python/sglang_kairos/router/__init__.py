"""The PD router: picks the pair of servers, carries the SLO to both, relays the answer.

A request's life: `app` routes it to `proxy`, which reads the body, checks its SLO (`slo_http`) and
describes it (`prompt`); `fleet` picks a pair (`policy.placement`) from what this router has sent
and what the servers report; `exchange` talks to both servers; `proxy` relays decode's answer.
`learn` turns what is observed on the way into the next predictions, `metrics` into numbers.
"""
