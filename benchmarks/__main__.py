"""Seconds of each part of DREAM+ and of the plain loop, measured in turns; and how time and memory grow.

    python -m benchmarks                       digits, MNIST and CIFAR-10 shapes, and growth
    python -m benchmarks --also compiled,candidates --shapes mnist --growth none
    python -m benchmarks --device cuda --shapes paper,paper100 --inner 100 --growth none
                                               on a GPU: the papers' settings for CIFAR
    python -m benchmarks gpu DATA/cifar10-jpeg on a GPU: tests, seconds and a distilled set in 8 minutes

The images are random pixels. The command writes a JSON record and a plot.
"""
import argparse
import json
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from dreamplus.core import Key, seeded, write_json
from dreamplus.data.core import ImageData
from dreamplus.data.sources import load_data
from dreamplus.loop.distill import distiller
from dreamplus.machine import keep_memory, peak_mib, pick_device
from dreamplus.nets.train import sgd
from dreamplus.parts import Target
from dreamplus.synthetic import decode

from . import gpu, head, make_parser, plain

SHAPES = dict(
    digits=dict(size=8, channels=1, images=1_257, ipc=1, factor=1, width=32, batch=32, n_data=64),
    mnist=dict(size=28, channels=1, images=60_000, ipc=10, factor=1, width=32, batch=128, n_data=500),
    mnist_f2=dict(size=28, channels=1, images=60_000, ipc=10, factor=2, width=32, batch=128, n_data=500),
    cifar=dict(size=32, channels=3, images=50_000, ipc=10, factor=2, width=32, batch=128, n_data=2000),
    paper=dict(size=32, channels=3, images=50_000, ipc=10, factor=2, width=128, batch=128, n_data=2000),
    paper100=dict(size=32, channels=3, images=50_000, ipc=10, factor=2, width=128, batch=128, n_data=2000,
                  classes=100))
SMALL = dict(size=8, channels=1, images=10_000, ipc=1, factor=1, width=8, batch=16, n_data=64, inner=10, classes=10)
ALSO = 'compiled', 'candidates', 'both', 'untuned'
CANDIDATES = 3 # one in so many images of a class is a candidate
SERVES = 10 # inner iterations for which a choice of real images is used
SPAN = 2 # least seconds for which a part is timed
REST = .05 # seconds until the threads of the previous call sleep
GROWTH = dict(classes=(10, 50, 100, 200), ipc=(1, 10, 50), images=(1_000, 10_000, 100_000, 1_000_000),
              width=(16, 32, 64, 128))

def toy(size, channels, images, classes=10, **_) -> ImageData:
    "Random pixels"
    with seeded(0): x = torch.randint(0, 256, (images, channels, size, size), dtype=torch.uint8)
    y = torch.arange(images)*classes//images
    return load_data((x, y), test=(x[::images//classes], y[::images//classes]))

def learner(data, device, ipc, factor, width, batch, n_data, inner, compiled=False, candidates=None, **_):
    "A Learner of DREAM+ for one outer iteration, without warming"
    own = dict(width=width, batch_real=batch, n_data=n_data, outer=1, inner=inner, start='random', warm_epochs=0.,
               compiled=compiled, candidates=candidates)
    return distiller(data, 'dream+', ipc, factor, device=str(device), **own)

def seconds(f, device, n=3, first=True):
    "The least seconds of `n` calls; `first`: after another one that does not count"
    if first: f()
    times = []
    for _ in range(n):
        if device.type == 'cuda': torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if device.type == 'cuda': torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)

def in_turn(calls, device, n=3):
    "The least seconds of each call; they take turns, `n` times and until `SPAN` seconds have passed"
    for f in calls.values(): f()
    rounds = []
    while len(rounds) < n or sum(sum(r.values()) for r in rounds) < SPAN:
        rounds.append({})
        for name, f in calls.items():
            time.sleep(REST)
            rounds[-1][name] = seconds(f, device, 1, first=False)
    return {name: min(r[name] for r in rounds) for name in calls}

def target(learn) -> Target:
    "What an inner iteration compares the synthetic images of all classes with"
    data, net, classes = learn.data, learn.network_cb.schedule.net, learn.data.class_batch()
    key = Key(0, 'benchmark', rows=classes.index)
    draw = learn.loss_func.match.augment.draw(data.n_classes, data.size, data.device, key=key.at('augment'))
    return Target(classes, learn.model.shown(classes.ids), net, learn.sample_cb.sampler(net, classes, key), draw)

def ours(learn):
    "Functions that do the parts of an inner iteration"
    schedule, sample, to = learn.network_cb.schedule, learn.sample_cb.sampler, target(learn)
    return dict(selection=lambda: sample(schedule.net, to.classes, Key(0), fresh=False),
                training=lambda: schedule.after_update(None, Key(0)),
                matching=lambda: learn.loss_func(learn.model(to.classes.index), to).backward())

def plainly(learn, shape):
    "The same for the plain loop"
    data, schedule, to = learn.data, learn.network_cb.schedule, target(learn)
    net = schedule.net = plain.plain_network(schedule.make())
    schedule.opt, augment, show = sgd(net), learn.loss_func.match.augment, lambda x: decode(x, shape['factor'])
    return dict(selection=lambda: plain.select(net, data, shape['batch']),
                training=lambda: schedule.after_update(None, Key(0)),
                matching=lambda: plain.step(net, data, learn.model.pixels, to.real, augment, to.draw, show))

def calls_of(side, data, shape, device):
    "Functions that do the parts of an inner iteration, and a whole outer iteration"
    some = max(shape['images']//data.n_classes//CANDIDATES, shape['batch'])
    how = {name: value for name, value in dict(compiled=True, candidates=some).items() if side in (name, 'both')}
    learn, whole = (learner(data, device, **shape, **how) for _ in range(2))
    if side == 'plain': return plainly(learn, shape) | dict(outer=partial(whole_plain, shape, whole))
    return ours(learn) | dict(outer=lambda: whole.fit(whole.dls.train.epochs))

class Untuned:
    "The plain loop in a process of its own, which leaves the allocator as it is"
    def __init__(self, shape, device):
        run = [sys.executable, '-m', 'benchmarks', '--untuned', json.dumps(shape), '--device', str(device)]
        self.process = subprocess.Popen(run, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    def __getitem__(self, name): return partial(self.ask, name)
    def ask(self, name):
        print(name, file=self.process.stdin, flush=True)
        if not self.process.stdout.readline(): raise RuntimeError('the process with the untuned allocator has ended')

def serve(shape, device):
    "Do the parts whose names are read from the standard input"
    calls = calls_of('plain', toy(**shape), shape, device)
    for name in sys.stdin:
        calls[name.strip()]()
        print('done', flush=True)

def parts(shape, device, also):
    "Seconds of each part, of an inner and of an outer iteration: ours, the plain loop's, and others"
    data, device = toy(**shape), pick_device(device)
    sides = {side: calls_of(side, data, shape, device) for side in ('ours', *also, 'plain') if side != 'untuned'}
    if 'untuned' in also: sides['untuned'] = Untuned(shape, device)
    out = {side: {} for side in sides}
    for part in 'selection', 'matching', 'training':
        for side, took in in_turn({side: calls[part] for side, calls in sides.items()}, device).items():
            out[side][part] = took/SERVES if part == 'selection' else took
    for side, times in out.items():
        times |= dict(inner=sum(times.values()), outer=seconds(sides[side]['outer'], device, 1, first=False))
    if 'untuned' in also: sides['untuned'].process.communicate()
    return out | dict(ratio={name: out['plain'][name]/t for name, t in out['ours'].items()})

def whole_plain(shape, learn):
    "An outer iteration of the plain loop, under a fresh network"
    data, schedule, augment = learn.data, learn.network_cb.schedule, learn.loss_func.match.augment
    net = schedule.net = plain.plain_network(schedule.make())
    schedule.opt = sgd(net)
    learn.create_opt()
    for i in range(shape['inner']):
        if i % SERVES == 0: real = plain.select(net, data, shape['batch'])
        draw = augment.draw(data.n_classes, data.size, data.device)
        plain.step(net, data, learn.model.pixels, real, augment, draw, lambda x: decode(x, shape['factor']))
        learn.opt.step()
        learn.opt.zero_grad()
        schedule.after_update(None, Key(0, i))

def point(shape, device):
    "Seconds of a selection and of an inner iteration without it, and the peak memory of this process"
    learn = learner(toy(**shape), device, **shape)
    device, calls, sample, to = learn.data.device, ours(learn), learn.sample_cb.sampler, target(learn)
    chosen = seconds(lambda: sample(to.net, to.classes, Key(0)), device, 1)
    def inner():
        calls['matching']()
        calls['training']()
    return dict(select=chosen, inner=seconds(inner, device), peak_mib=peak_mib(device))

def growth(names, device):
    "What `point` measures as the classes, the images or the width grow"
    out = {}
    for name in names:
        out[name] = []
        for value in GROWTH[name]:
            shape = SMALL | {name: value}
            if name == 'classes': shape['images'] = 100*value
            run = [sys.executable, '-m', 'benchmarks', '--point', json.dumps(shape), '--device', device] # its own peak
            said = subprocess.run(run, check=True, text=True, stdout=subprocess.PIPE).stdout
            out[name].append({name: value} | json.loads(said))
            print(out[name][-1], flush=True)
    return out

AXIS = .01, 100 # seconds and GiB, one scale for all

def draw(record, path):
    "The plot of a record"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter
    bars, grown = record['parts'], record['growth']
    fig = plt.figure(figsize=(10, 9.6 if grown else 5.8), layout='constrained')
    rows = 1 + bool(grown)
    top, *below = fig.subfigures(rows, 1, squeeze=False, height_ratios=(3, 2)[:rows])[:, 0]
    ax, names = top.subplots(), ('selection', 'matching', 'training')
    for i, r in enumerate(bars.values()):
        sides = [side for side in ('untuned', 'plain', 'ours', 'compiled', 'candidates', 'both') if side in r]
        for n, side in enumerate(sides):
            at, left = i + .85*((n + .5)/len(sides) - .5), 0
            for color, name in enumerate(names):
                ax.barh(at, r[side][name], .7/len(sides), left=left, color=f'C{color}',
                        label=name if i == n == 0 else None)
                left += r[side][name]
            ax.text(left, at, f' {side}', fontsize=10, va='center')
    ax.set(yticks=range(len(bars)), yticklabels=bars, xlabel='seconds of an inner iteration')
    ax.margins(x=.15)
    ax.invert_yaxis()
    ax.legend(loc='upper right')
    for part in below:
        axs = part.subplots(1, len(grown), sharey=True, squeeze=False)[0]
        for ax, (name, rows) in zip(axs, grown.items()):
            x = [r[name] for r in rows]
            ax.loglog(x, [r['inner'] for r in rows], 'o-', label='seconds of an inner iteration')
            ax.loglog(x, [r['select'] for r in rows], 's-', label='seconds of a selection')
            ax.loglog(x, [r['peak_mib']/1024 for r in rows], '^:', c='.6', label='peak memory, GiB')
            ax.set_xticks(x, [EngFormatter(sep='')(v) for v in x]) # 1k, 1M
            ax.set(xlabel=name, ylim=AXIS)
            ax.minorticks_off()
        part.legend(*ax.get_legend_handles_labels(), ncols=3, loc='outside upper center', frameon=False)
    fig.savefig(path, dpi=90)

def main():
    if sys.argv[1:2] == ['gpu']: return gpu.main()
    parser = make_parser('benchmarks', __doc__, 'benchmarks.json')
    parser.add_argument('--shapes', default='digits,mnist,mnist_f2,cifar', help='of ' + ', '.join(SHAPES) + '; or none')
    parser.add_argument('--growth', default=','.join(GROWTH), help='of ' + ', '.join(GROWTH) + '; or none')
    parser.add_argument('--also', default='none', help='also, of ' + ', '.join(ALSO))
    parser.add_argument('--inner', type=int, default=20, help='inner iterations of the outer iteration [20]')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--point', help=argparse.SUPPRESS)
    parser.add_argument('--untuned', help=argparse.SUPPRESS)
    a = parser.parse_args()
    device, also = pick_device(a.device), [] if a.also == 'none' else a.also.split(',')
    if set(also) - set(ALSO): parser.error(f'--also {a.also} is not of {", ".join(ALSO)}')
    if a.untuned: return serve(json.loads(a.untuned), device)
    keep_memory()
    if a.point: return print(json.dumps(point(json.loads(a.point), a.device)))
    shapes = [] if a.shapes == 'none' else a.shapes.split(',')
    record = head({name: toy(**SHAPES[name]).digest for name in shapes}, [0], device)
    record |= dict(machine=platform.machine(), inner=a.inner, parts={}, growth={})
    for name in shapes:
        record['parts'][name] = parts(SHAPES[name] | dict(inner=a.inner), a.device, also)
        print(name, json.dumps(record['parts'][name], indent=1), flush=True)
    if a.growth != 'none': record['growth'] = growth(a.growth.split(','), a.device)
    write_json(a.out, record)
    draw(record, Path(a.out).with_suffix('.png'))
    print(f'{a.out} and {Path(a.out).with_suffix(".png")}')

if __name__ == '__main__': main()
