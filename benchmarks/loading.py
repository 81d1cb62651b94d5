"""Seconds to load a folder of images, decoded or from the cache, and the peak memory of the process.

    python -m benchmarks.loading DATA/cifar10-jpeg
"""
import os
import tempfile
import time

import torch

from dreamplus.core import write_json
from dreamplus.data.sources import load_data
from dreamplus.machine import peak_mib

from . import head, make_parser

def load(folder):
    "Seconds, and the data"
    start = time.perf_counter()
    data = load_data(folder)
    return time.perf_counter() - start, data

def main():
    parser = make_parser('benchmarks.loading', __doc__, 'loading.json')
    parser.add_argument('folder')
    parser.add_argument('--later', type=int, default=5, help='loads from the cache [5]')
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
