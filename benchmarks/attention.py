"""Which powers of attention maps, and how much of the channels?

Ten handwritten digits, moved by each kind of map at three rates, three seeds.

    python -m benchmarks.attention --out attention.json

Nothing is chosen by the test split: accuracies are those on a held-out part of train.
"""
import argparse
from itertools import product

from dreamplus.core import write_json
from dreamplus.loop.distill import distill
from dreamplus.judge.evaluate import EvalCB
from dreamplus.loop.loops import MATCHERS
from dreamplus.match.attention import AttentionMatcher, AttentionMixer
from dreamplus.data.sources import load_data

from . import head

# argument names that no recipe has: it would fill them in
KINDS = {'spatial, p=1': lambda: AttentionMatcher(1.), 'spatial, p=4': lambda: AttentionMatcher(4.),
         **{f'and channels, p={p}, p_c={q}': lambda a=p, b=q: AttentionMixer(a, b) for p in (1, 4) for q in (1, 4)},
         **{f'and channels, p=4, p_c=4, {w} times': lambda w=w: AttentionMixer(channel=w) for w in (.1, 10.)}}
RATES, SEEDS = (.01, .003, .001), (0, 1, 2)

class EndCB(EvalCB):
    "Accuracies at the end only"
    def __init__(self, nets):
        super().__init__()
        self.nets = nets
    def after_epoch(self): pass
    def after_fit(self): self.accs = [self.measure(k) for k in range(self.nets)]

def cell(kind, lr, seed, steps, nets):
    end, data = EndCB(nets), load_data('digits', seed=seed).hold_out(.3, seed)
    MATCHERS['kind'] = KINDS[kind]
    distill(data, 'datadam', seed=seed, cbs=[end], log=None, match='kind', width=16, depth=3, outer=steps, lr=lr)
    return dict(kind=kind, lr=lr, seed=seed, accs=end.accs)

def main():
    parser = argparse.ArgumentParser('python -m benchmarks.attention', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--nets', type=int, default=2)
    parser.add_argument('--out', default='attention.json')
    a = parser.parse_args()
    record = head({f'digits, seed {s}': load_data('digits', seed=s).digest for s in SEEDS}, SEEDS)
    starts = [cell('spatial, p=1', 0., seed, 1, a.nets) for seed in SEEDS]
    cells = []
    for kind, lr, seed in product(KINDS, RATES, SEEDS):
        cells.append(cell(kind, lr, seed, a.steps, a.nets))
        print(cells[-1], flush=True)
        write_json(a.out, record | dict(starts=starts, cells=cells))

if __name__ == '__main__': main()
