"""1,000 classes of 64 pixels in 1 and 2 processes: preparation, ten updates of `best` and of DREAM+, memory, bits.

    python -m benchmarks.scale MNIST DATA/cifar10-jpeg

The images of the two sources are turned, mirrored and recoloured, so that each of their classes becomes 50. They are
written as JPEG in the layout of ImageNet. Networks, real images and training are small, so the seconds say how work
grows, and not how long a run of the papers takes. ImageNet-1K is planned, and not run.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import permutations, product
from pathlib import Path

import torch
from PIL import Image

from dreamplus.core import write_json
from dreamplus.data.core import fingerprint
from dreamplus.data.datasets import DATASETS
from dreamplus.data.sources import load_data
from dreamplus.labs.plan import plan, plan_data
from dreamplus.loop.distill import distill
from dreamplus.machine import keep_memory, peak_mib
from dreamplus.processes import joined

from . import head, make_parser

CLASSES, EACH, SIZE = 1000, 50, 64
FEW, RATE = 4, 2e13 # classes that are planned; assumed float32 operations of a GPU in a second
KILL = 15 # seconds after which the first preparation is killed
SMALL = dict(width=16, log=None, steps=10)
METHODS = {'best': dict(bank_nets=2, bank_stages='30', stat_images=10),
           'dream+': dict(batch_real=4, candidates=8, n_data=64, warm_epochs=0., net_batch=64, inner=10)}
LOOKS = [*product(permutations(range(3)), range(4), (False, True))] # channels, quarter turns, mirrored: 48

def looks(x, k): # uint8 (N,ch,h,w); below 50
    "Variant `k` of the images of a class: (N,3,h,w)"
    order, turns, mirror = LOOKS[k % len(LOOKS)]
    x = x.expand(-1, 3, -1, -1)[:, list(order)].rot90(turns, (2, 3))
    if x.shape[1] and k >= len(LOOKS): x = 255 - x
    return x.flip(3) if mirror else x

def make(folder, sources, classes, each):
    "Write `each` training images and one test image of each class"
    parts = [[part.x[s:s + n] for s, n in zip(part.starts, part.counts)] for part in (d.train for d in sources)]
    base = [x for part in parts for x in part]
    for c in range(classes):
        k, x = c//len(base), base[c % len(base)]
        at = torch.arange(each + 1)*(len(x)//(each + 1)) # others for each class
        for i, image in enumerate(looks(x[(at + k) % len(x)], k)):
            path = folder/('val' if i == each else 'train')/f'n{c:04}'/f'{i:03}.JPEG'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((SIZE, SIZE)).save(path, quality=90)

def data_of(root, classes):
    "The prepared images of the first classes"
    data = load_data('imagenet', root=root, size=SIZE)
    return data if classes == data.n_classes else data.select(range(classes))

def timed(f):
    "Seconds, and the result"
    start = time.perf_counter()
    found = f()
    return time.perf_counter() - start, found

def point(root, method, classes):
    "What one process measures; rank 0 prints it"
    keep_memory()
    with joined() as group:
        data = data_of(root, classes)
        whole, dset = timed(partial(distill, data, method, **SMALL | METHODS[method]))
        peaks = group.everyone(round(peak_mib(data.device)))
        found = dict(method=method, classes=classes, processes=group.world, seconds=dset.provenance['seconds'],
                     whole=whole, peak_mib=peaks, pixels=fingerprint(dset.pixels))
        print('point ' + json.dumps(found), flush=True)

def start(processes, *argv):
    "Run `point` in processes of their own"
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes),
               '-m', 'benchmarks.scale', *map(str, argv)]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = [line for line in done.stdout.split('\n') if line.startswith('point ')]
    if not lines: raise RuntimeError(done.stderr[-2000:])
    return json.loads(lines[0].removeprefix('point '))

def prepare(root):
    "Seconds of a load and of the next one, images, MiB of pixels, and the peak memory of this process"
    took, data = timed(partial(load_data, 'imagenet', root=root, size=SIZE))
    again, _ = timed(partial(load_data, 'imagenet', root=root, size=SIZE))
    pixels = data.train.x.nbytes + data.test.x.nbytes
    return dict(rest=took, again=again, images=len(data.train) + len(data.test), mib=pixels/2**20,
                peak_mib=peak_mib(data.device))

def preparation(root):
    "As `prepare`, after a kill in the middle of the first load"
    half = subprocess.Popen([sys.executable, '-c', f'from benchmarks.scale import prepare; prepare({str(root)!r})'])
    time.sleep(KILL)
    killed = half.poll() is None
    half.kill(), half.wait()
    code = f'import json; from benchmarks.scale import prepare; print(json.dumps(prepare({str(root)!r})))'
    done = subprocess.run([sys.executable, '-c', code], check=True, text=True, stdout=subprocess.PIPE)
    return dict(killed_after=KILL if killed else None) | json.loads(done.stdout.split('\n')[-2])

def planned():
    "Work of ImageNet-1K at 64 pixels, from plans of some of its classes with random images, and hours at `RATE`"
    whole, out = plan_data('imagenet', size=SIZE), {}
    times, data = whole.n_classes/FEW, whole.select(range(FEW))
    for method in METHODS:
        found = plan(data, method, 1, nets=0)
        flops = {p['part']: p['flops'] for p in found['parts'] if p['part'] != 'network bank'} # which is made once
        fixed = flops.pop('training the network', 0.) + flops.pop('warming the network', 0.)*times
        dealt = sum(flops.values())*times
        hours = {n: (dealt/n + fixed)/RATE/3600 for n in (1, 2, 4, 8)}
        out[method] = dict(dealt_flops=dealt, fixed_flops=fixed, hours=hours)
    row = DATASETS['imagenet']
    return out | dict(rate=RATE, data_gib=row.train*3*SIZE**2/2**30, pixels_mib=row.classes*3*SIZE**2*4/2**20)

def main():
    parser = make_parser('benchmarks.scale', __doc__, 'scale.json')
    parser.add_argument('sources', nargs='*', help='folders with MNIST and with the images of CIFAR-10')
    parser.add_argument('--growth', default='10,100,1000', help='numbers of classes [10,100,1000]')
    parser.add_argument('--processes', default='1,2', help='numbers of processes [1,2]')
    parser.add_argument('--plans', action='store_true', help='plan ImageNet-1K too, which takes minutes')
    parser.add_argument('--folder', help='where the images are, or will be; default: a temporary folder')
    parser.add_argument('--point', nargs=3, metavar=('ROOT', 'METHOD', 'CLASSES'), help='what one process does')
    a = parser.parse_args()
    if a.point: return point(a.point[0], a.point[1], int(a.point[2]))
    counts, worlds = ([*map(int, text.split(','))] for text in (a.growth, a.processes))
    with tempfile.TemporaryDirectory() as own:
        root = Path(a.folder or own)
        sources = [load_data('mnist', root=Path(s).parent) if Path(s).name == 'MNIST' else load_data(s)
                   for s in a.sources]
        os.environ['DREAMPLUS_CACHE'] = str(root/'cache')
        if not (root/'val').exists(): make(root, sources, CLASSES, EACH)
        record = head({d.name: d.digest for d in sources}, [0])
        record |= dict(classes=CLASSES, each=EACH, size=SIZE, settings=dict(SMALL | METHODS, log=None),
                       preparation=preparation(root), points=[])
        print(record['preparation'], flush=True)
        for classes, method, world in product(counts, METHODS, worlds):
            record['points'].append(start(world, '--point', root, method, classes))
            print(record['points'][-1], flush=True)
    for classes, method in product(counts, METHODS):
        same = {p['pixels'] for p in record['points'] if (p['classes'], p['method']) == (classes, method)}
        if len(same) > 1: raise RuntimeError(f'{method}, {classes} classes: pixels depend on the number of processes')
    if a.plans: record['plans'] = planned()
    write_json(a.out, record)
    print(a.out)

if __name__ == '__main__': main()
