"""How many seconds methods need to reach an accuracy, on a held-out tenth of the training images.

    python -m benchmarks.race cifar10-jpeg --root FOLDER --runs idc,idc:k-means,best

A run is a method, or METHOD:START. Each lasts `--minutes` of distillation, but `best` its `--steps`. Its accuracy is
measured about 10 times. Seconds include the choice of initial images. They do not include the network bank, whose
seconds are in the record, and the measurements. The command adds what is missing to an existing record.
"""
from pathlib import Path

from dreamplus.core import read_json, write_json
from dreamplus.data.sources import load_data
from dreamplus.judge.validate import ValidAccuracy
from dreamplus.loop.callbacks import LoopCB
from dreamplus.loop.distill import distill
from dreamplus.machine import keep_memory

from . import head, make_parser

NUMBERS = dict(ipc=(10, 'images per class'), steps=(205, 'inner iterations of best'), width=(32, 'of the networks'),
               minutes=(20., 'of distillation'), nets=(1, 'networks at each report'))

class CurveCB(LoopCB):
    "Records inner iterations, seconds and accuracies at the start and at each report"
    order, run_valid = 90, True
    def __init__(self): self.points = []
    def before_fit(self):
        self.clock_cb.before_validate()
        self.learn.metrics[0].validate(self.learn)
        self.clock_cb.after_validate()
        self.after_epoch()
    def after_epoch(self):
        accs = [*self.learn.metrics[0].accs]
        self.points.append(dict(step=self.dls.train.at, seconds=self.clock_cb.seconds, accs=accs))
        print(self.points[-1], flush=True)

def measure(held, run, seed, a):
    "The curve of one run"
    method, _, start = run.partition(':')
    length = dict(steps=a.steps, report=max(1, a.steps//10)) if method == 'best' else dict(minutes=a.minutes)
    curve, own = CurveCB(), dict(start=start) if start else {}
    dset = distill(held, method, a.ipc, seed=seed, cbs=[curve], metrics=[ValidAccuracy(nets=a.nets)], log=None,
                   width=a.width, **length, **own)
    return dict(run=run, seed=seed, bank_seconds=dset.provenance.get('bank', {}).get('trained', 0), points=curve.points)

def main():
    parser = make_parser('benchmarks.race', __doc__, 'race.json')
    parser.add_argument('data', help='as in `dreamplus distill`')
    parser.add_argument('--root', help='folder of the data')
    parser.add_argument('--runs', default='idc,idc:k-means,best', help='[idc,idc:k-means,best]')
    for name, (default, text) in NUMBERS.items():
        parser.add_argument(f'--{name}', type=type(default), default=default, help=f'{text} [{default}]')
    parser.add_argument('--seeds', default='0', help='[0]')
    a = parser.parse_args()
    data, seeds = load_data(a.data, **dict(root=a.root) if a.root else {}), [*map(int, a.seeds.split(','))]
    keep_memory()
    runs = read_json(a.out)['runs'] if Path(a.out).exists() else []
    record = head({data.name: data.digest}, seeds) | {k: getattr(a, k) for k in ('ipc', 'width', 'nets')}
    for seed in seeds:
        for run in a.runs.split(','):
            if any((r['run'], r['seed']) == (run, seed) for r in runs): continue
            runs.append(measure(data.hold_out(.1, 0), run, seed, a))
            write_json(a.out, record | dict(runs=runs))

if __name__ == '__main__': main()
