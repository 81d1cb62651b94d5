"Timings and small studies: each a command that writes one record; `python -m benchmarks --help`."
import shlex
import sys

import torch

from dreamplus.core import versions


def head(data: dict, seeds: list, device='cpu') -> dict: # data: name -> digest
    "What each record begins with: how it came about"
    spec = sys.modules['__main__'].__spec__ # None under `python -c`
    name = spec.name.removesuffix('.__main__') if spec else 'benchmarks'
    return dict(command=f'python -m {name} {shlex.join(sys.argv[1:])}'.strip(), device=str(device),
                threads=torch.get_num_threads(), seeds=list(seeds), data=data, versions=versions())
