"Timings and small studies. Each is a command that writes one record: `python -m benchmarks --help`."
import argparse
import shlex
import sys
from itertools import pairwise

import torch

from dreamplus.machine import versions


def make_parser(name: str, text: str, out: str) -> argparse.ArgumentParser: # Module, its docstring, default of --out
    "The parser of a command; it has --out"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f'python -m {name}', description=text, formatter_class=raw)
    parser.add_argument('--out', default=out, help=f'file of the record [{out}]')
    return parser

def head(data: dict, seeds: list, device='cpu') -> dict: # Dataset to digest; seeds of everything random
    "The first entries of a record: how it was made"
    spec = sys.modules['__main__'].__spec__ # None under `python -c`
    name = spec.name.removesuffix('.__main__') if spec else 'benchmarks'
    given = [a for before, a in pairwise(['', *sys.argv[1:]]) if '--out' not in (before, a)]
    return dict(command=shlex.join(['python', '-m', name, *given]), device=str(device),
                threads=torch.get_num_threads(), seeds=list(seeds), data=data, versions=versions())
