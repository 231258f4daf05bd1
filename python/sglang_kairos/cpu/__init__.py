"""Lets stock SGLang wheels run on a machine without a GPU.

`runtime` decides and hooks the import system, `adapt` fills the gaps, `site` switches it on for
every process of an environment. `flags` knows the server flags that a CPU needs, `tiny_model` makes
a model to serve, `zygote` starts servers in seconds. On a machine with a GPU nothing here acts.
"""
