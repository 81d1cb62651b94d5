"""What makes `best`: its recipe with one change at a time, scored on held-out training images.

    python -m benchmarks.best cifar10-jpeg --root FOLDER --ipc 10 --steps 205

The test split is not used. The command adds what is missing to an existing record.
"""
import copy
from pathlib import Path

from dreamplus.core import read_json, write_json
from dreamplus.data.sources import load_data
from dreamplus.judge.evaluate import score
from dreamplus.loop.distill import distill
from dreamplus.machine import keep_memory
from dreamplus.match.core import match_terms
from dreamplus.recipes import recipe
from dreamplus.runs import first_seed

from . import head, make_parser

# `teach` multiplies the weight of the teacher, `also` is added to the loss, `method` replaces `best`, `now` is today's
# recipe, the others are arguments of `distill`
COMMON = [{}, dict(now=True), dict(statistic='embedding'), dict(teach=0), dict(teach=3), dict(bank_stages='450,1500'),
          dict(factor=3, teach=1/4), dict(statistic='squares'), dict(statistic='waves'), dict(teach=1/3),
          dict(lr_schedule='constant'), dict(start='random'), dict(teacher='same'), dict(lr=5e-3), dict(lr=.02),
          dict(label_lr=.01), dict(start_candidates=500), dict(factor=1), dict(bank_stages='1500'),
          dict(bank_nets=1), dict(bank_nets=6), dict(bank_mix=.5)]
# at 1 image per class, the weight of the teacher changes with the number of decoded images
ONE = [{}, dict(now=True), dict(statistic='embedding'), dict(factor=2, teach=3), dict(factor=3, teach=3),
       dict(factor=5, teach=1/3), dict(teach=0), dict(teach=1/3), dict(teach=10)]
DIGITS = [{}, dict(now=True), dict(statistic='embedding'), dict(statistic='squares'), dict(teach=0), dict(teach=.1),
          dict(teach=1/3), dict(teach=3), dict(lr=.01), dict(lr=.2), dict(steps=100), dict(steps=1000),
          dict(bank_nets=1), dict(bank_nets=6), dict(bank_stages='50,100'), dict(bank_stages='100,600'),
          dict(start='random'), dict(teacher='same'), dict(method='dream+'), dict(also='0.01*gradient'),
          dict(augment='color_crop_scale_rotate', bank_augment='color_crop_scale_rotate')]
MNIST = [{}, dict(now=True), dict(statistic='blocks'), dict(teach=0), dict(teach=1/3), dict(teach=3), dict(lr=5e-3),
         dict(lr=.02), dict(start='random'), dict(bank_stages='300'), dict(bank_nets=1), dict(bank_nets=6),
         dict(teacher='same'), dict(statistic='waves'), dict(lr_schedule='constant'), dict(label_lr=.01),
         dict(factor=2), dict(also='0.01*gradient')]
OWN = dict(digits=DIGITS, mnist=MNIST)
# The recipe to which each change is made is that before cells were enlarged bicubically; `now` is the recipe of today
EARLIER = {('digits', 1): dict(eval_augment='color_crop_scale_rotate'),
           ('mnist', 1): dict(match='statistics + 0.1*teach', lr=.01, factor=2),
           ('mnist', 10): dict(match='statistics + 0.02*teach', lr=.01, factor=1)}
NUMBERS = dict(ipc=(10, 'images per class'), steps=(205, 'inner iterations'), width=(32, 'of the networks'),
               nets=(2, 'networks for each accuracy'), first=(99, 'so many changes only'))

def overrides(change, data, ipc):
    "A change as arguments of `distill`"
    if 'now' in change: return {}
    before = {} if 'method' in change else dict(decode='single') | EARLIER.get((data.name, ipc), {})
    before |= dict(eval_mix=.5*(change.get('factor', before['factor']) == 1)) if 'factor' in before else {}
    own = before | {k: v for k, v in change.items() if k not in ('teach', 'also')}
    match = own.get('match') or recipe('best', data, ipc)['match']
    if 'teach' in change:
        scaled = [(w*change['teach'] if name == 'teach' else w, name) for w, name in match_terms(match)]
        match = ' + '.join(f'{w:.4g}*{name}' for w, name in scaled if w)
    if 'also' in change: match, own = f'{match} + {change["also"]}', own | dict(shared_draw=True)
    return own | dict(match=match) if {'teach', 'also'} & {*change} else own

def measure(data, change, seed, a):
    "Accuracies of one set, and what it cost"
    held = data.hold_out(a.valid, 0)
    own = dict(method='best', width=a.width, steps=a.steps) | overrides(change, data, a.ipc)
    dset = distill(held, ipc=a.ipc, seed=seed, log=None, **own)
    scored = copy.copy(held)
    scored.test = held.valid
    [row] = score(dset, scored, n=a.nets, rows=('distilled',), seed=first_seed(seed))
    made = dset.provenance
    return dict(change=change, seed=seed, accs=row['accs'], steps=made['steps'], seconds=made['seconds'],
                bank_seconds=made.get('bank', {}).get('seconds', 0))

def main():
    parser = make_parser('benchmarks.best', __doc__, 'study-best.json')
    parser.add_argument('data', help='as in `dreamplus distill`')
    parser.add_argument('--root', help='folder of the data')
    for name, (default, text) in NUMBERS.items():
        parser.add_argument(f'--{name}', type=int, default=default, help=f'{text} [{default}]')
    parser.add_argument('--seeds', default='0,1,2', help='[0,1,2]')
    parser.add_argument('--budgets', help='inner iterations to measure in place of the changes, for example 60,120,720')
    parser.add_argument('--valid', type=float, default=.1, help='fraction of train that is held out [0.1]')
    a = parser.parse_args()
    data, seeds = load_data(a.data, **dict(root=a.root) if a.root else {}), [*map(int, a.seeds.split(','))]
    keep_memory()
    cells = read_json(a.out)['cells'] if Path(a.out).exists() else []
    record = head({data.name: data.digest}, seeds)
    record |= {k: getattr(a, k) for k in ('ipc', 'steps', 'width', 'nets', 'valid')}
    changes = OWN.get(data.name) or (ONE if a.ipc == 1 else COMMON)
    plain = overrides({}, data, a.ipc)
    changes = [c for c in changes if not c or overrides(c, data, a.ipc) != plain]
    if a.budgets: changes = [dict(steps=int(n)) for n in a.budgets.split(',')]
    for seed in seeds:
        for change in changes[:a.first]:
            if any(c['change'] == change and c['seed'] == seed for c in cells): continue
            cells.append(measure(data, change, seed, a))
            print(cells[-1], flush=True)
            write_json(a.out, record | dict(cells=cells))

if __name__ == '__main__': main()
