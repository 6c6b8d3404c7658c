"""The benchmarks, a folder per subject. These files are run, from any folder; the others serve them:

- `kernels/kernels.py`: every codec on one thread, or on a GPU, against a copy of the same array;
- `collectives/collectives.py`: allreduces side by side, steps of DistributedDataParallel, plans, errors;
- `train/train.py`: a real model trained through compressed collectives;
- `reproduce/reproduce.py`: the works of the page, each beside its paper and beside dense training;
- `cluster/cluster.py`: a command on several hosts of one machine, with TCP of a chosen rate between them.

`report.py` keeps the rows of all in JSON files, prints their tables and draws their pictures.
"""
