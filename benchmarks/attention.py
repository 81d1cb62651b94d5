"""Powers of attention maps, and the weight of the channel maps.

Ten handwritten digits are learned with each kind of map at three learning rates and three seeds.

    python -m benchmarks.attention

Accuracies are those on a validation split; the test split is not used.
"""
from itertools import product

from dreamplus.core import write_json
from dreamplus.data.sources import load_data
from dreamplus.judge.validate import ValidAccuracy
from dreamplus.loop.distill import distiller

from . import head, make_parser

KINDS = {'spatial, p=1': dict(match='attention', p=1.), 'spatial, p=4': dict(match='attention', p=4.)}
KINDS |= {f'and channels, p={p:.0f}, p_c={q:.0f}': dict(match='atom', p=p, p_channel=q)
          for p, q in product((1., 4.), repeat=2)}
KINDS |= {f'and channels, p=4, p_c=4, {w} times': dict(match='atom', p=4., channel=w) for w in (.1, 10.)}
RATES, SEEDS = (.01, .003, .001), (0, 1, 2)

def measure(kind, lr, seed, steps, nets):
    "Accuracy of networks trained on the images after so many inner iterations"
    data = load_data('digits', seed=seed).hold_out(.3, seed)
    learn = distiller(data, 'datadam', seed=seed, width=16, depth=3, outer=steps, lr=lr, **KINDS[kind])
    learn.fit(learn.dls.train.epochs)
    metric = ValidAccuracy(nets=nets)
    metric.validate(learn)
    return dict(kind=kind, lr=lr, seed=seed, accs=list(metric.accs))

def main():
    parser = make_parser('benchmarks.attention', __doc__, 'tuning-attention.json')
    parser.add_argument('--steps', type=int, default=100, help='inner iterations [100]')
    parser.add_argument('--nets', type=int, default=2, help='networks for each accuracy [2]')
    a = parser.parse_args()
    record = head({f'digits, seed {s}': load_data('digits', seed=s).digest for s in SEEDS}, SEEDS)
    starts, cells = [measure('spatial, p=1', 0., seed, 1, a.nets) for seed in SEEDS], []
    for kind, lr, seed in product(KINDS, RATES, SEEDS):
        cells.append(measure(kind, lr, seed, a.steps, a.nets))
        print(cells[-1], flush=True)
        write_json(a.out, record | dict(starts=starts, cells=cells))

if __name__ == '__main__': main()
