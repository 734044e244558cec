"""Benchmarks that a sceptic can run: `python -m bench --help`.

workloads.py   what is measured: named shapes, each with its source
problems.py    a workload made concrete: data, parameters, fp64 reference, work and traffic
providers.py   who is measured: nlpkernels and its peers, each run the way that suits it best
measure.py     the protocol: check, then interleave; quantiles, memory
machine.py     what this machine is and what it could reach at best (with floor.cpp)
report.py      tables of README and docs, plots, comparison of two runs
gpu_report.py  all that needs a GPU, tests and sanitisers too, in one go
"""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: its exporter warns below Python
