"""Other ways to embed, cluster, choose, match and train: seconds, and what they change.

    python -m benchmarks.alternatives --root DATA mnist DATA/cifar10-jpeg
    python -m benchmarks.alternatives --root DATA --device cuda --width 128 --ways bfloat16,compiled,vmap cifar10

The package offers bfloat16 and compiled training, compiled embedding, and a choice among fewer candidates. The other
ways are left out, and the record shows why.
"""
import copy
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F

from dreamplus.choose.kmeans import kmeans, representatives
from dreamplus.choose.samplers import RandomSampler, RepresentativeSampler, class_table, embed_classes
from dreamplus.core import Key, seeded, write_json
from dreamplus.data.core import to_float
from dreamplus.data.sources import load_data
from dreamplus.judge.protocols import accuracy_on
from dreamplus.machine import keep_memory, pick_device
from dreamplus.nets.augment import Augment
from dreamplus.nets.convnet import ConvNet
from dreamplus.nets.train import Stream, fast_call, sgd, train

from . import head, make_parser, plain
from .__main__ import learner, seconds, target

WAYS = 'bfloat16', 'channels_last', 'compiled', 'threads', 'vmap'
BATCH, NETS, STEPS, IPC, KEPT = 64, 4, 150, 10, 128 # of a network's training; picks of a class
CANDIDATES = 2000, 1000, 500
AUGMENT = Augment('color_crop')

def cast(f): # inside, convolutions and products in bfloat16
    def call(*args):
        with torch.autocast(args[-1].device.type, torch.bfloat16): return f(*args).float()
    return call

def side_by_side(f, parts): # each on a thread of its own
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool: found = list(pool.map(f, parts))
    torch.set_num_threads(threads)
    return found

def timed(f, device):
    found = []
    return seconds(lambda: found.append(f()), device, 1, first=False), found[0]

def embedded(net, data, way, batch):
    "All training images, sorted by class (N,D)"
    if way == 'channels_last' or way == 'compiled' and data.device.type == 'cpu': # as `embed_classes`
        net = copy.deepcopy(net).to(memory_format=torch.channels_last)
    f = cast(net.embed) if way == 'bfloat16' else fast_call(net.embed, compiled=way == 'compiled', sizes={batch})
    @torch.no_grad()
    def part(x):
        x = data.normalize(to_float(x))
        return f(x.contiguous(memory_format=torch.channels_last) if way == 'channels_last' else x)
    parts = data.train.x.split(batch)
    return lambda: torch.cat(side_by_side(part, parts) if way == 'threads' else [part(x) for x in parts])

def picks(e, data):
    table, mask = class_table(data.train)
    with seeded(0): chosen = representatives(e[table], KEPT, mask)
    return [set(row) for row in chosen.tolist()]

def embedding(data, ways, width):
    "Seconds to embed all images, and the share of the images then chosen that float32 did not choose"
    with seeded(0): net = ConvNet(data.channels, data.n_classes, data.size, width).to(data.device)
    own, compiled = (128, 32) if data.device.type == 'cpu' else (2048, 2048) # as `embed_classes` has them
    out, chosen = {}, {}
    rest = [(way, compiled if way == 'compiled' else own) for way in ways if way != 'vmap']
    embedded(net, data, 'own', own)() # the memory that all of them use
    for way, batch in [('own', own), ('batches of half', own//2), *rest]:
        f = embedded(net, data, way, batch)
        out[way], chosen[way] = dict(seconds=seconds(f, data.device, 2)), picks(f(), data)
        out[way]['changed'] = sum(len(a - b) for a, b in zip(chosen['own'], chosen[way]))/(KEPT*data.n_classes)
        print('embedding', way, out[way], flush=True)
    return out

def clustering(data, ways, width):
    "Seconds to cluster all classes anew, and the inertia over that of the best of three by scikit-learn"
    with seeded(0): net = ConvNet(data.channels, data.n_classes, data.size, width).to(data.device)
    x, mask = embed_classes(net, data)
    classes = [e[m] for e, m in zip(x, mask)]
    def library(e): return KMeans(KEPT, n_init=3, random_state=0).fit(e.cpu().numpy()).inertia_
    def plainly(e): # as the released codes
        centres = plain.kmeans(e, e[torch.randperm(len(e), device=e.device)[:KEPT]])
        return torch.cdist(e, centres).min(1)[0].square().sum().item()
    out = {}
    for way, f in dict(library=lambda: sum(map(library, classes)), plain=lambda: sum(map(plainly, classes)),
                       own=lambda: kmeans(x, KEPT, mask).distance[mask].sum().item()).items():
        with seeded(0): took, inertia = timed(f, data.device)
        out[way] = dict(seconds=took, inertia=inertia/(out['library']['inertia'] if out else 1))
        print('clustering', way, out[way], flush=True)
    return out | dict(library=out['library'] | dict(inertia=1.))

def choosing(data, ways, width):
    "Seconds of a choice, and the mean squared distance to the nearest chosen image over that of a choice among all"
    with seeded(0): net = ConvNet(data.channels, data.n_classes, data.size, width).to(data.device)
    (x, mask), first = embed_classes(net, data), torch.tensor(data.train.starts, device=data.device)[:, None]
    def spread(chosen):
        return sum(torch.cdist(e[m], e[i]).min(1)[0].square().mean().item() for e, m, i in zip(x, mask, chosen - first))
    samplers = dict(own=RepresentativeSampler(data, KEPT), random=RandomSampler(data, KEPT))
    samplers |= {f'{n} candidates': RepresentativeSampler(data, KEPT, candidates=n) for n in CANDIDATES}
    out = {}
    for way, sampler in samplers.items():
        with seeded(0): took, chosen = timed(partial(sampler, net, data.class_batch(), Key(0)), data.device)
        found = spread(chosen)
        if way == 'own': whole = found
        out[way] = dict(seconds=took, spread=found/whole)
        print('choosing', way, out[way], flush=True)
    return out

def plainly_pooled(net):
    "A copy whose pooling is torch's: compiled, the second derivatives of ours would be wrong"
    net = copy.deepcopy(net)
    for block in net.blocks: block.pool = nn.AvgPool2d(2)
    return net

def by_transforms(learn, to):
    "The gradient of the pixels by torch.func inside one compiled function, called class by class"
    match, net = learn.loss_func.match, plainly_pooled(to.net)
    weights, distance = {k: p.detach() for k, p in net.named_parameters()}, match.matcher.parts[0].distance
    convs, embed = [k for k, p in weights.items() if p.ndim > 2], Embeds(net)
    last = weights['classifier.weight'], weights['classifier.bias']
    def found(x, y, weights): # embeddings (N,D), gradients [(1,...)]
        def loss(own):
            e = torch.func.functional_call(embed, {f'net.{k}': p for k, p in (weights | own).items()}, (x,))
            return F.cross_entropy(F.linear(e, *last), y.expand(len(x))), e
        grads, e = torch.func.grad(loss, has_aux=True)({k: weights[k] for k in convs})
        return e, [g[None] for g in grads.values()]
    def value(x, y, weights, real):
        e, grads = found(x, y, weights)
        return (distance(e.mean(0)[None], real[0].mean(0)[None]) + sum(map(distance, grads, real[1]))).sum()
    look, change = torch.compile(found), torch.compile(torch.func.grad(value))
    def step():
        shown, pixels = learn.model(to.classes.index), learn.model.pixels
        x, rows = shown.detach().unflatten(0, (len(to.counts), -1)), learn.data.train.x[to.real]
        def see(x, c):
            draw = {k: v[c:c + 1] for k, v in to.draw.items()}
            return match.augment(learn.data.normalize(x)[None], draw)[0]
        def of(c):
            real = look(see(to_float(rows[c]), c), to.classes.index[c], weights)
            own = x[c].clone().requires_grad_()
            seen = see(own, c)
            return torch.autograd.grad(seen, own, change(seen.detach(), to.classes.index[c], weights, real))[0]
        return torch.autograd.grad(shown, pixels, torch.cat([of(c) for c in range(len(x))]))[0]
    return step

class Embeds(nn.Module):
    "A network whose output is its embedding"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net.embed(x)

def matching(data, ways, width):
    "Seconds of a step for ten images a class, and how far from ours the gradient of the pixels is"
    own = dict(ipc=IPC, factor=1, width=width, batch=KEPT, n_data=500, inner=10)
    learn, out, grads = learner(data, data.device, **own), {}, {}
    to = target(learn)
    def step(way):
        with torch.autocast(data.device.type, torch.bfloat16, enabled=way == 'bfloat16'):
            value = learn.loss_func(learn.model(to.classes.index), to)
        return torch.autograd.grad(value, learn.model.pixels)[0]
    transforms = by_transforms(learn, to)
    for way in ['own', *(w for w in ways if w in ('bfloat16', 'compiled'))]:
        f = transforms if way == 'compiled' else partial(step, way)
        first, grads[way] = timed(f, data.device) # with the compilation
        out[way] = dict(seconds=seconds(f, data.device), first=first)
        out[way]['off'] = ((grads[way] - grads['own']).norm()/grads['own'].norm()).item()
        print('matching', way, out[way], flush=True)
    return out

def one(net, get, steps, **how):
    stream = Stream(IPC*get.classes, BATCH, get.device, tail=True)
    train(net, sgd(net), get, stream, steps, AUGMENT, call=fast_call(net, **how))

def stacked(nets, get, steps):
    "All networks in one pass, each with batches and draws of its own"
    params, buffers = torch.func.stack_module_state(nets)
    params = {k: p.detach().requires_grad_() for k, p in params.items()}
    bare = copy.deepcopy(nets[0]).to('meta')
    call = torch.vmap(lambda p, b, x: torch.func.functional_call(bare, (p, b), (x,)))
    opt = torch.optim.SGD(params.values(), lr=.01, momentum=.9, weight_decay=5e-4)
    streams = [Stream(IPC*get.classes, BATCH, get.device) for _ in nets] # batches of one size
    for _ in range(steps):
        x, y = map(torch.stack, zip(*(get(next(s)) for s in streams)))
        draw = AUGMENT.draw(len(nets)*x.shape[1], x.shape[-1], x.device)
        out = call(params, buffers, AUGMENT(x.flatten(0, 1), draw).view_as(x))
        opt.zero_grad()
        (F.cross_entropy(out.flatten(0, 1), y.flatten())*len(nets)).backward()
        opt.step()
    for i, net in enumerate(nets): net.load_state_dict({k: p[i].detach() for k, p in params.items()})

class Get:
    "Normalised images and labels of the first `IPC` of each class"
    def __init__(self, data):
        at = class_table(data.train)[0][:, :IPC].flatten()
        self.x, self.y, self.classes, self.device = data.train.x[at], data.train.y[at], data.n_classes, data.device
        self.look = data.normalize
    def __call__(self, i): return self.look(to_float(self.x[i])), self.y[i]

def training(data, ways, width):
    "Seconds for one of several networks on a small set, and the accuracy (mean and std) on the held-out part"
    get, out = Get(data), {}
    how = dict(bfloat16=dict(bf16=True), compiled=dict(compiled=True), both=dict(bf16=True, compiled=True))
    def go(way, steps):
        with seeded(0): # the threads share what they draw
            nets = [ConvNet(data.channels, data.n_classes, data.size, width).to(data.device) for _ in range(NETS)]
            if way == 'vmap': stacked(nets, get, steps)
            elif way == 'threads': side_by_side(lambda net: one(net, get, steps), nets)
            else:
                for net in nets: one(net, get, steps, **how.get(way, {}))
        return nets
    both = ['both'] if {'bfloat16', 'compiled'} <= set(ways) else []
    for way in ['own', *(w for w in ways if w != 'channels_last'), *both]:
        go(way, 2)
        took, nets = timed(lambda way=way: go(way, STEPS), data.device)
        accs = [accuracy_on(net, data.valid, data) for net in nets]
        out[way] = dict(seconds=took/NETS, acc=statistics.mean(accs), std=statistics.stdev(accs))
        print('training', way, out[way], flush=True)
    return out

def main():
    parser = make_parser('benchmarks.alternatives', __doc__, 'alternatives.json')
    parser.add_argument('data', nargs='+')
    parser.add_argument('--root')
    parser.add_argument('--width', type=int, default=32)
    parser.add_argument('--ways', default=','.join(WAYS), help='of ' + ', '.join(WAYS))
    parser.add_argument('--device', default='cpu')
    a = parser.parse_args()
    keep_memory()
    device, found, ways = pick_device(a.device), {}, a.ways.split(',')
    for name in a.data:
        found[name] = load_data(name, root=a.root).hold_out(.1, 0).to(device)
    record = head({d.name: d.digest for d in found.values()}, [0], device) | dict(width=a.width, data_sets={})
    for data in found.values():
        parts = embedding, clustering, choosing, matching, training
        record['data_sets'][data.name] = {f.__name__: f(data, ways, a.width) for f in parts}
        write_json(a.out, record)

if __name__ == '__main__': main()
