"Sampling, starts and losses are no property of a method: each can be asked for in any that looks at real images."
from itertools import cycle

import pytest
import torch
from fastai.callback.core import Callback

from dreamplus.core import seeded, toy_images
from dreamplus.data.core import to_float
from dreamplus.data.sources import load_data
from dreamplus.loop.distill import distill, distiller
from dreamplus.match.core import View, make_matcher
from dreamplus.match.experts import train_experts
from dreamplus.nets.zoo import create_net, has_batch_norm
from dreamplus.recipes import METHODS, recipe

PATHS = 'mtt', 'tesla'
LEAST = dict(ipc=2, width=8, depth=2, inner=2)
TINY = LEAST | dict(batch_real=6, net_batch=8)
CHANGES = {'representative': dict(sampler='representative'), 'subcluster': dict(sampler='subcluster', subsample=3),
           'start': dict(start='k-means'), 'noise': dict(start='noise'), 'adam': dict(optimiser='adam'),
           'match': dict(match='gradient + 0.5*embedding'), 'classes': dict(class_batch=2),
           'three': dict(match='0.1*attention + feature + 2*embedding'), 'labels': dict(label_lr=.1)}
ALL = dict(match='bidirectional', sampler='representative', start='herding')
LOOKING = [m for m in METHODS if m not in PATHS and recipe(m, 'cifar10')['networks'] != 'bank']

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(classes=3, per_class=30, size=16))

@pytest.fixture(scope='module')
def experts(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('experts')
    experts = train_experts(data, out, n=1, epochs=3, width=8, depth=2, log=None)
    return dict(experts=str(experts.path), max_start=1, syn_steps=2, expert_epochs=1, zca=False)

def moved(data, method, **kw):
    "The pixels after a run of four inner iterations, and how far they are from where they began"
    with seeded(0):
        learn = distiller(data, method, outer=2, **kw)
        start = learn.model.pixels.detach().clone()
        with learn.no_bar(): learn.fit(learn.dls.train.epochs)
    last = learn.model.pixels.detach()
    assert last.isfinite().all() and learn.dls.train.at == 4
    return last, (last - start).abs().max().item()

# Each change in two methods at least, and all at once in each method
ASKED = [(m, name, CHANGES[name]) for m, name in zip(LOOKING*2, cycle(CHANGES))] + [(m, 'all', ALL) for m in LOOKING]

@pytest.mark.parametrize('method, change', [(m, c) for m, _, c in ASKED], ids=[f'{m}, {name}' for m, name, _ in ASKED])
def test_any_sampler_start_and_loss(data, method, change):
    few = dict(n_data=12) if METHODS[method].args.get('networks') != 'synthetic' else dict(net_epochs=1)
    assert moved(data, method, **TINY | few | change)[1] > 0

@pytest.mark.parametrize('method, change', [
    ('mtt', dict(start='k-means')), ('tesla', dict(match='trajectory + 0.5*embedding', label_lr=.1)),
    ('mtt', dict(match='2*trajectory + gradient', sampler='representative'))], ids=str)
def test_trajectories_take_a_start_and_another_term(data, experts, method, change):
    assert moved(data, method, **(TINY if 'match' in change else LEAST) | experts | change)[1] > 0

@pytest.mark.parametrize('method, change, reason', [
    ('mtt', dict(sampler='representative'), "sampler='representative' has no effect with match='trajectory'"),
    ('mtt', dict(networks='synthetic'), "networks='synthetic' has no effect with match='trajectory'"),
    ('dm', dict(decode='sharp'), "'decode' has no effect here: with factor=1, images are used as they are stored"),
    ('dc', dict(warm_epochs=1), "'warm_epochs' has no effect here: it is an argument of networks='real'"),
    ('dm', dict(subsample=2), "'subsample' has no effect here: it is an argument of sampler='representative'"),
    ('dsa', dict(match='gradients'), "match='gradients' is unknown; did you mean 'gradient'?"),
    ('dream+', dict(start='best'), "start='best' is unknown"), ('dm', dict(optimiser='sdg'), "did you mean 'sgd'?"),
    ('dm', dict(sampler='subcluster', subsample=2, batch_real=5), 'batch_real=5 is not a multiple of subsample=2'),
    ('dm', dict(compiled=True, inner=1), "'compiled' has no effect here: its networks are not trained"),
    ('mtt', dict(batch_real=5), "'batch_real' has no effect here: it is an argument of .*, which this method does not"),
    ('mtt', dict(match='trajectory + gradient', n_data=5, inner=1), 'is used for 1 inner iteration'),
    ('idc', dict(p=1.), "'p' has no effect here: it is an argument of match='attention'"),
    ('datadam', dict(p_channel=1.), "'p_channel' has no effect here: it is an argument of match='atom'"),
    ('idc', dict(syn_steps=3), "'syn_steps' has no effect here: it is an argument of match='trajectory'"),
    ('dm', dict(interval=5), "'interval' has no effect here: it is an argument of sampler='representative'"),
    ('dream', dict(candidates=2, batch_real=4), 'candidates=2 is below batch_real=4; use at least'),
    ('idc', dict(net_epochs=5), "'net_epochs' has no effect here: it is an argument of networks='synthetic'"),
    ('dsa', dict(n_data=5), "'n_data' has no effect here: it is an argument of networks='real'"),
    ('idc', dict(optimiser='adam', momentum=.5), "'momentum' has no effect here: it is an argument of optimiser='sgd'"),
    ('mtt', dict(experts=None), 'experts=None: give a folder of experts'),
    ('dream', dict(match='trajectory + embedding'), 'syn_lr=None: give the initial learning rate of the student'),
    ('dc', dict(match='feature', block=7), 'block=7 is not one of the')])
def test_what_makes_no_sense_is_refused(data, experts, method, change, reason):
    path = 'trajectory' in change.get('match', METHODS[method].args['match'])
    given = (LEAST if path and 'match' not in change else TINY) | (experts if path else {}) | change
    with pytest.raises(ValueError, match=reason): distill(data, method, outer=1, log=None, **given)

@pytest.mark.parametrize('method', ['dc', 'dsa'])
def test_an_added_embedding_pulls(data, method):
    "beside gradients compared by cosine, of which only signs would be left to an embedding"
    with seeded(0): net = create_net('convnet', 1, 3, 16, width=8)
    x, y = data.train.x.unflatten(0, (3, 21)).float()/255, torch.arange(3) # the rest is the test split
    def gradient(distance):
        syn = x[:, :2].clone().requires_grad_()
        matcher = make_matcher('embedding', dict(distance=distance))
        loss = matcher(View(net, x[:, 10:], y, graph=False), View(net, syn, y)).sum()
        return torch.autograd.grad(loss, syn)[0]
    own = recipe(method, 'toys')['distance']
    assert own == 'cos' and gradient('mse').norm() > 0 and torch.equal(gradient(own), gradient('mse'))

def test_raw_features_choose_the_start_too(data):
    "the released code embeds pixels that were not normalised"
    a, b = (distiller(data, 'dream', raw_features=raw, **TINY).model.pixels for raw in (False, True))
    assert not torch.equal(a, b)

class BatchNormCB(Callback):
    "Computes the loss of an update under batch norm again, by a plain loop"
    def __init__(self, data, by_hand): self.data, self.by_hand, self.seen = data, by_hand, []
    def after_loss(self):
        target, = self.yb
        self.seen.append(has_batch_norm(target.net))
        pixels = self.model.pixels.detach().unflatten(0, (3, -1))
        real, syn = (self.data.normalize(x) for x in (to_float(self.data.train.x[target.real]), pixels))
        expected = self.by_hand(target.net, real, syn) # of (C,N,ch,h,w)
        torch.testing.assert_close(self.loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)

def joint_embedding(net, real, syn): # DM's code: all classes are one batch
    mean = lambda x: net.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)
    return (mean(real) - mean(syn)).pow(2).sum()

def rowwise_cosine(net, real, syn): # DC's: one class after the other
    weights, loss = [p for p in net.parameters() if p.ndim > 1], 0
    for c, pair in enumerate(zip(real, syn)):
        ce = [torch.nn.functional.cross_entropy(net(x), torch.full((len(x),), c)) for x in pair]
        for a, b in zip(*(torch.autograd.grad(l, weights) for l in ce)):
            a, b = a.flatten(1), b.flatten(1)
            loss += (1 - (a*b).sum(1)/(a.norm(dim=1)*b.norm(dim=1) + 1e-6)).sum()
    return loss

def apart_l2(net, real, syn): # IDC's: each class is a batch of its own
    weights, loss = [p for p in net.parameters() if p.ndim == 4], 0
    for c, pair in enumerate(zip(real, syn)):
        ce = [torch.nn.functional.cross_entropy(net(x), torch.full((len(x),), c)) for x in pair]
        for a, b in zip(*(torch.autograd.grad(l, weights) for l in ce)): loss += (a - b).pow(2).sum()
    return loss

@pytest.mark.parametrize('method, by_hand, mixes, change', [
    ('dm', joint_embedding, True, {}), ('dc', rowwise_cosine, False, dict(net_epochs=1)),
    ('idc', apart_l2, True, dict(n_data=12, factor=1, distance='mse', net_augment=''))])
def test_batch_norm_as_each_code_has_it(data, method, by_hand, mixes, change):
    "DM: over all classes. DC and DSA: frozen, so that chunks make no difference. IDC: within a class."
    for chunk in (None,) if mixes else (None, 1, 0):
        check = BatchNormCB(data, by_hand)
        distill(data, method, outer=1, norm='batch', augment='', chunk=chunk, cbs=[check], log=None, **TINY | change)
        assert check.seen == [mixes]*2

def test_choices_of_gradients_and_blocks(data):
    "What DC's and IDC's codes offer beside their own choice"
    pixels = lambda **change: moved(data, 'dc', net_epochs=1, **TINY | change)[0]
    usual, last = pixels(), pixels(match='feature')
    for change in dict(bias=True), dict(flat=True), dict(bias=True, flat=True):
        assert not torch.equal(pixels(**change), usual)
    assert not torch.equal(pixels(match='feature', block=0), last)

SOME = [('dream+', dict(n_data=12, warm_epochs=0.)), ('dsa', dict(net_epochs=1)), ('atom', {})]

@pytest.mark.parametrize('method, own', SOME)
def test_chunks_change_nothing_but_rounding(data, method, own):
    "in a whole run, with classes in turn, choices, limits and augmentation"
    pixels = lambda chunk, limit=1: moved(data, method, **TINY | own, class_batch=2, chunk=chunk, limit=limit)[0]
    torch.testing.assert_close(pixels(0), pixels(1), rtol=0, atol=1e-4)
    assert not torch.equal(pixels(0), pixels(0, limit=2))
