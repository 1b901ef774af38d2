"""A plug-in of vLLM: a server answers under any preference from one saved gated policy.

``pip install miepo`` beside vLLM makes it known; ``VLLM_PLUGINS=miepo`` lets it add to the server's routes, too.
Nothing else of miepo is imported there but what reads a preference.

* ``model: "NAME@relevance=0.2,brevity=0.8"``, or ``preference: {"relevance": 0.2, "brevity": 0.8}`` in the body of a
  request (:mod:`miepo.vllm.endpoint`), where the adapter NAME is a folder of ``miepo export`` for the whole simplex.
* Its gate is applied inside the LoRA layers, one for each request, so that requests of any number of preferences share
  one adapter and one batch (:mod:`miepo.vllm.gates`).
* Without the routes, a resolver makes a plain adapter of each preference that is asked for
  (:mod:`miepo.vllm.resolver`).
"""
