"Classes come from the batch: some at a time, in any chunks, and nothing of a class depends on the others beside it."
from dataclasses import replace

import pytest
import torch
from fastai.callback.core import Callback
from processes import Process

from dreamplus.choose.coresets import CORESETS, coreset
from dreamplus.choose.kmeans import kmeans
from dreamplus.choose.samplers import SAMPLERS
from dreamplus.core import Key, toy_images
from dreamplus.data.core import Split
from dreamplus.data.sources import load_data
from dreamplus.loop.callbacks import DistillLoaders
from dreamplus.loop.distill import distill, distiller, resume
from dreamplus.machine import peak_mib
from dreamplus.match.core import MATCHERS, Matcher
from dreamplus.nets.augment import Augment
from dreamplus.nets.convnet import ConvNet
from dreamplus.parts import Iterations
from dreamplus.synthetic import STARTS, SyntheticSet, start_pixels

C = 5
UNEVEN = [1, 3, 2, 2, 1] # images of each class
TINY = dict(width=8, batch_real=4)
METHODS = {'dream+': dict(TINY, factor=1, n_data=8, net_batch=8, warm_epochs=.2, interval=2, distance='mse'),
           'idc': dict(TINY, factor=2, n_data=8, net_batch=8, decode='multi', limit=3, start='noise'),
           'dm': TINY, 'datadam': TINY, 'dsa': dict(TINY, net_epochs=1, net_batch=8)}

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(classes=C, per_class=20, size=8))

def learner(data, method, ipc, **change):
    "A Learner whose epoch is one inner iteration"
    return distiller(data, method, ipc, report=1, **METHODS[method] | change)

@pytest.mark.parametrize('method', ['idc', 'dm'])
def test_one_class(data, method):
    assert distill(data.select([3]), method, 1, outer=1, inner=2, log=None, **METHODS[method]).counts == [1]

def test_counts_may_be_a_tuple(data):
    assert distill(data, 'dm', tuple(UNEVEN), outer=1, log=None, **TINY).counts == UNEVEN

def test_a_class_without_training_images(data):
    "A folder may list an empty class, and a selection of the test split may have one"
    train = Split(data.train.x[data.train.y != 2], data.train.y[data.train.y != 2], C)
    for start in 'noise', 'random':
        with pytest.raises(ValueError, match="class '2' has no training images"):
            distill(replace(data, train=train), 'dm', 1, start=start, log=None, **TINY)

# Batches

@pytest.mark.parametrize('size', [1, 2, 5, None])
def test_every_class_once_in_each_pass(data, size):
    seen = {seed: [] for seed in (0, 1)}
    for seed, batches in seen.items():
        train = DistillLoaders(data, Iterations(30, 1, report=4, class_batch=size), seed).train
        while train.at < 30: batches += [x.tolist() for x, _ in train]
        per_pass = -(-C//(size or C))
        for i in range(0, 30, per_pass): assert sorted(sum(batches[i:i + per_pass], [])) == [*range(C)]
        assert all(b == sorted(b) for b in batches)
        if size in (1, 2): assert batches[:per_pass] != batches[per_pass:2*per_pass] # in another order
    assert (seen[0] == seen[1]) is (size in (5, None))

@pytest.mark.parametrize('method', METHODS)
def test_classes_in_batches(data, method):
    "All images are moved, and a step moves no class but those of the batch"
    class StepCB(Callback):
        order, moved = 1, set()
        def before_step(self):
            ids = self.model.pixels.grad.flatten(1).any(1).nonzero().flatten().tolist()
            assert {*ids} <= {*self.learn.classes.ids}
            self.moved.update(ids)
    args = METHODS[method] | dict(outer=2, inner=2, class_batch=2)
    dset = distill(data, method, cbs=[StepCB()], log=None, **args)
    assert dset.pixels.isfinite().all() and StepCB.moved == {*range(C)}

@pytest.mark.parametrize('method', ['dream+', 'dm'])
def test_a_batch_of_all_classes(data, method):
    args = METHODS[method] | dict(outer=2, inner=2, log=None)
    whole, same = (distill(data, method, class_batch=n, **args) for n in (None, C))
    assert torch.equal(whole.pixels, same.pixels)

def test_uneven_classes_in_batches(data):
    dset = distill(data, 'idc', UNEVEN, outer=2, inner=3, class_batch=2, label_lr=.1, log=None, **METHODS['idc'])
    assert dset.counts == UNEVEN and dset.pixels.isfinite().all()

def test_a_stopped_run_goes_on_with_its_classes(data, tmp_path):
    class StopCB(Callback):
        order = 90
        def after_batch(self): self.learn.checkpoint_cb.stop = self.learn.dls.train.at == 4
    args = METHODS['dream+'] | dict(outer=2, inner=4, class_batch=2)
    whole = distill(data, 'dream+', log=None, **args)
    with pytest.raises(KeyboardInterrupt): distill(data, 'dream+', out=tmp_path/'run', cbs=[StopCB()], log=None, **args)
    assert torch.equal(resume(tmp_path/'run', data, log=None).pixels, whole.pixels)

def test_trajectories_need_all_classes(data, tmp_path):
    from dreamplus.match.experts import train_experts
    folder = train_experts(data, tmp_path, n=1, epochs=3, width=8, log=None).path
    args = dict(experts=str(folder), max_start=1, expert_epochs=1, zca=False, width=8, log=None)
    with pytest.raises(ValueError, match='class_batch=2: trajectories are matched with all classes at once; leave'):
        distill(data, 'mtt', class_batch=2, **args)

# A class alone and among others

@pytest.mark.parametrize('method, ipc', [*((m, UNEVEN) for m in METHODS), ('idc', 2)], ids=str)
def test_chunks_change_nothing_but_rounding(data, method, ipc):
    moved = []
    for chunk in 0, 1, 2:
        learn = learner(data, method, ipc, chunk=chunk)
        start = learn.model.pixels.detach().clone()
        learn.fit(1)
        moved.append(learn.model.pixels.detach() - start)
    for m in moved[1:]: assert moved[0].norm() > 0 and (m - moved[0]).norm() <= 1e-3*moved[0].norm()

@pytest.mark.parametrize('method', METHODS)
def test_a_class_does_not_see_its_neighbours(data, method):
    "Its images after an inner iteration are the same, whichever classes are in the batch"
    moved = []
    for ids in (3,), (1, 3), (2, 3, 4), range(C):
        learn = learner(data, method, 2, per_class_steps=False)
        start = learn.model.pixels.detach()[6:8].clone() # of class 3
        learn.dls.train.classes = lambda i, ids=ids: data.class_batch(ids)
        learn.fit(1)
        moved.append(learn.model.pixels.detach()[6:8] - start)
    for m in moved[1:]: assert moved[0].norm() > 0 and (m - moved[0]).norm() <= 1e-3*moved[0].norm()

class Apart(Matcher):
    "A coupled matcher: keeps the mean embeddings of the classes apart"
    separable = False
    def terms(self, real, syn): return dict(apart=-torch.pdist(syn.embed.mean(1)).mean())

def test_a_coupled_matcher_is_never_cut(data, monkeypatch):
    monkeypatch.setitem(MATCHERS, 'apart', Apart)
    for match in 'apart', 'embedding + 2*apart':
        args = dict(METHODS['dm'], match=match, outer=2, log=None)
        whole, *others = (distill(data, 'dm', 2, chunk=n, **args).pixels for n in (0, 1, 2))
        for part in others: assert torch.equal(part, whole)

SOME = torch.tensor([3, 0, 4]) # of the classes

def key(rows=None): return Key(0, 'test', rows=torch.arange(C) if rows is None else rows)

@pytest.mark.parametrize('pick', ['stack', 'one'])
@pytest.mark.parametrize('ops', ['color_crop_cutout_flip_scale_rotate', 'imagenet', 'stretch_turn_noise'])
def test_augmentation_of_a_class(ops, pick):
    augment = Augment(ops, pick)
    whole, some = augment.draw(C, 8, key=key()), augment.draw(3, 8, key=key(SOME))
    assert whole.keys() == some.keys()
    for name in whole: assert torch.equal(whole[name][SOME], some[name])

def test_clusters_of_a_class():
    x, mask = torch.randn(C, 30, 6), torch.arange(30) < torch.tensor([[30], [12], [25], [30], [17]])
    whole, some = kmeans(x, 4, mask, key=key()), kmeans(x[SOME], 4, mask[SOME], key=key(SOME))
    assert torch.equal(whole.labels[SOME][mask[SOME]], some.labels[mask[SOME]])

@pytest.mark.parametrize('name', CORESETS)
def test_coresets_of_a_class(data, name):
    net, few = ConvNet(1, C, 8, width=8), data.select(SOME.tolist())
    whole, some = (coreset(name, d, 4, net, key=key(rows)) for d, rows in ((data, None), (few, SOME)))
    assert torch.equal(data.train.x[whole[SOME]], few.train.x[some])

@pytest.mark.parametrize('name', STARTS)
def test_starts_of_a_class(data, name):
    net, few = ConvNet(1, C, 8, width=8), data.select(SOME.tolist())
    few.mean, few.std = data.mean, data.std
    whole, some = (start_pixels(d, 2, 1, name, net, key(rows)) for d, rows in ((data, None), (few, SOME)))
    assert torch.equal(whole[SOME], some)

@pytest.mark.parametrize('name', SAMPLERS)
def test_real_images_of_a_class(data, name):
    net, (whole, some) = ConvNet(1, C, 8, width=8), (SAMPLERS[name](data, 4) for _ in range(2))
    every, few = data.class_batch(), data.class_batch(SOME.tolist())
    for i, fresh in enumerate([True, False, True]): # new clusters, those of before, new ones
        assert torch.equal(whole(net, every, Key(0, i), fresh)[SOME], some(net, few, Key(0, i), fresh))

def test_shown_images_of_a_class():
    "A random subset of the decoded images"
    syn = SyntheticSet(torch.rand(C, 6, 1, 8, 8), None, limit=4)
    syn.key = Key(0, 'subset')
    assert torch.equal(syn(torch.arange(C)).unflatten(0, (C, 4))[SOME], syn(SOME).unflatten(0, (3, 4)))

# Many classes

def many(method, args):
    "Peak memory in MiB of 2 inner iterations on 1,000 classes at 32 pixels; all at once take 1.5 to 3.7 GiB"
    torch.manual_seed(0)
    x, y = torch.randint(0, 256, (2000, 3, 32, 32), dtype=torch.uint8), torch.arange(1000).repeat_interleave(2)
    data = load_data((x, y), test=(x[::2], y[::2]))
    args |= dict(class_batch=100, chunk=0, width=32, factor=1, start='random', batch_real=1)
    dset = distill(data, method, device='cpu', steps=2, log=None, **args)
    assert dset.pixels.shape == (1000, 3, 32, 32) and dset.provenance['steps'] == 2
    return peak_mib(torch.device('cpu'))

@pytest.mark.parametrize('method, args', [('dream+', dict(warm_epochs=.01, n_data=16, net_batch=16)), ('dm', {})],
                         ids=['dream+', 'dm'])
def test_a_thousand_classes(method, args):
    peak, status = Process(many, method, args).end()
    assert status == 0 and peak < 1.25*1024
