"""One command for a GPU, of at most 8 minutes: tests, seconds of DREAM+ and `best` at full width, a distilled set, and
updates in a group of one process, whose engine is nccl.

    python -m benchmarks gpu DATA/cifar10-jpeg
"""
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dreamplus.core import write_json
from dreamplus.data.sources import load_data
from dreamplus.judge.evaluate import score
from dreamplus.loop.distill import distill, distiller
from dreamplus.machine import hardware, peak_mib, pick_device
from dreamplus.processes import joined

from . import head, make_parser

TESTS = 'tests/test_device.py', 'tests/test_methods.py', 'tests/test_bank.py' # on the best device of this machine

def tests(limit):
    "The last line of pytest, or that it took longer than `limit` seconds"
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *TESTS]
    try: done = subprocess.run(command, cwd=Path(__file__).parents[1], text=True, stdout=subprocess.PIPE, timeout=limit)
    except subprocess.TimeoutExpired: return f'stopped after {limit} s'
    return done.stdout.strip().split('\n')[-1]

def seconds_per_iteration(data, method, ipc, width, device, few, **own):
    "Seconds of an inner iteration, after as many that do not count; the GPU is waited for"
    learn = distiller(data, method, ipc, width=width, device=device, **own)
    def run(n):
        learn.dls.train.report = n # an epoch
        with learn.no_bar(): learn.fit(1)
        if learn.data.device.type == 'cuda': torch.cuda.synchronize()
    run(few)
    start = time.perf_counter()
    run(few)
    return (time.perf_counter() - start)/few

def in_group(data, width, device):
    "Two updates in a group of one process: its engine, seconds, and how the pixels differ from those without a group"
    own = dict(width=width, device=str(device), steps=2, warm_epochs=0., log=None)
    alone, weights = distill(data, 'dream+', 1, **own), torch.ones(10**6, device=device)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1]) # a free one
    env = dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    os.environ |= env
    try:
        with joined() as group:
            start = time.perf_counter()
            dset = distill(data, 'dream+', 1, **own)
            group.share([weights]) # by nccl on a GPU
            return dict(engine=str(torch.distributed.get_backend_config()), seconds=time.perf_counter() - start,
                        sent=weights.mean().item(), difference=(dset.pixels - alone.pixels).abs().max().item())
    finally:
        for name in env: del os.environ[name]

def main():
    parser = make_parser('benchmarks gpu', __doc__, 'gpu.json')
    parser.add_argument('folder', help='images of CIFAR-10 in class folders')
    parser.add_argument('--device', default=None, help='default: the best one here')
    parser.add_argument('--width', type=int, default=128, help='of the networks [128]')
    parser.add_argument('--ipc', type=int, default=10, help='images per class [10]')
    parser.add_argument('--minutes', type=float, default=3, help='of distilling by `best` [3]')
    parser.add_argument('--few', type=int, default=20, help='inner iterations that are timed [20]')
    parser.add_argument('--nets', type=int, default=3, help='networks that evaluate the set [3]')
    parser.add_argument('--tests', type=float, default=120, help='most seconds of the tests; 0: none [120]')
    given = sys.argv[1:]
    a = parser.parse_args(given[1:] if given[:1] == ['gpu'] else given)
    device, data = pick_device(a.device), load_data(a.folder)
    record = head({data.name: data.digest}, [0], device) | dict(hardware=hardware(device), width=a.width, ipc=a.ipc)
    if a.tests: record['tests'] = tests(a.tests)
    with tempfile.TemporaryDirectory() as bank:
        own = dict(bank_folder=bank)
        dset = distill(data, 'best', a.ipc, width=a.width, device=str(device), minutes=a.minutes, **own)
        rows = score(dset, data, n=a.nets, rows=('distilled', 'random-factor'), device=str(device), cache=False)
        times = {'best': seconds_per_iteration(data, 'best', a.ipc, a.width, str(device), a.few, **own)}
    times['dream+'] = seconds_per_iteration(data, 'dream+', a.ipc, a.width, str(device), a.few, warm_epochs=0.)
    record['group'] = in_group(data, a.width, device)
    record |= dict(seconds=times, rows=rows, updates=dset.provenance['steps'], bank=dset.provenance['bank'],
                   peak_mib=peak_mib(device))
    print(record)
    write_json(a.out, record)

if __name__ == '__main__': main()
