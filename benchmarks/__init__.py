"Timings and small studies: each a command that writes one record; `python -m benchmarks --help`."
import shlex
import sys
from itertools import pairwise

import torch

from dreamplus.machine import versions


def head(data: dict, seeds: list, device='cpu') -> dict: # data: name -> digest
    "What each record begins with: how it came about"
    spec = sys.modules['__main__'].__spec__ # None under `python -c`
    name = spec.name.removesuffix('.__main__') if spec else 'benchmarks'
    given = [a for before, a in pairwise(['', *sys.argv[1:]]) if '--out' not in (before, a)] # says nothing
    return dict(command=shlex.join(['python', '-m', name, *given]), device=str(device),
                threads=torch.get_num_threads(), seeds=list(seeds), data=data, versions=versions())
