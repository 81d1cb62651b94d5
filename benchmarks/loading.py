"""A folder of images: decoded the first time, from the cache later; seconds, and peak memory of a fresh process.

    python -m benchmarks.loading DATA/cifar10-jpeg --out loading.json
"""
import argparse
import os
import tempfile
import time

import torch
from dreamplus.core import write_json
from dreamplus.machine import peak_mib
from dreamplus.data.sources import load_data

from . import head

def load(folder): # -> seconds, data
    start = time.perf_counter()
    data = load_data(folder)
    return time.perf_counter() - start, data

def main():
    parser = argparse.ArgumentParser('python -m benchmarks.loading', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('--later', type=int, default=5, help='loads from the cache [5]')
    parser.add_argument('--out', default='loading.json')
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ['DREAMPLUS_CACHE'] = cache
        first, data = load(a.folder)
        later = [load(a.folder)[0] for _ in range(a.later)]
    x = [part.x for part in (data.train, data.test)]
    record = head({data.name: data.digest}, [0]) | dict(
        dataset=data.name, images=sum(map(len, x)), mib=sum(t.nbytes for t in x)/2**20,
        peak_mib=peak_mib(torch.device('cpu')), seconds=dict(first=first, later=later))
    print(record)
    write_json(a.out, record)

if __name__ == '__main__': main()
