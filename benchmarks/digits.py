"""The arguments of DREAM+ for the digits, and variations of them.

    python -m benchmarks.digits

The data are the images that are training images under all three seeds. About a third of them is the validation split,
which takes the place of the test split.
"""
from dataclasses import replace

import torch

from dreamplus.core import write_json
from dreamplus.data.core import Split
from dreamplus.data.sources import load_data
from dreamplus.judge.evaluate import score
from dreamplus.loop.distill import distill
from dreamplus.runs import first_seed

from . import head, make_parser

SEEDS = 0, 1, 2
PLAIN = dict(eval_augment='', eval_mix=0.)
CHANGES = [{}, dict(lr=6e-3), dict(augment='color_crop_scale_rotate', net_augment='color_crop_scale_rotate'),
           dict(inner=20), dict(outer=10, inner=20, lr=6e-3), dict(distance='mse', lr=.05),
           dict(n_data=0, warm_epochs=1.), dict(net_mix=0.), dict(net_mix=0., outer=40), PLAIN, dict(factor=2),
           PLAIN | dict(factor=2)]

def common():
    "The digits' training images under every seed, as training images"
    loaded = [load_data('digits', seed=s) for s in SEEDS]
    data, train = loaded[0], loaded[0].train
    flat = [d.train.x.flatten(1) for d in loaded]
    kept = torch.stack([(flat[0][:, None] == other).all(2).any(1) for other in flat[1:]]).all(0)
    return replace(data, train=Split(train.x[kept], train.y[kept], data.n_classes))

def measure(data, change, seed, nets):
    "Accuracies on the validation split"
    held = data.hold_out(.35, seed)
    held = replace(held, test=held.valid)
    dset = distill(held, 'dream+', ipc=1, seed=seed, log=None, **change)
    rows = score(dset, held, n=nets, rows=('distilled', 'random', 'k-means'), seed=first_seed(seed))
    return dict(change=change, seed=seed, accs={r['set']: r['accs'] for r in rows})

def main():
    parser = make_parser('benchmarks.digits', __doc__, 'tuning-digits.json')
    parser.add_argument('--nets', type=int, default=3, help='networks for each accuracy [3]')
    a = parser.parse_args()
    data, cells = common(), []
    record = head({'digits, common': data.digest}, SEEDS) | dict(images=len(data.train))
    for change in CHANGES:
        for seed in SEEDS:
            cells.append(measure(data, change, seed, a.nets))
            print(cells[-1], flush=True)
        write_json(a.out, record | dict(cells=cells))

if __name__ == '__main__': main()
