"Sampling, starts and losses are no property of a method: each can be asked for in any that looks at real images."
import pytest
import torch
from fastai.callback.core import Callback

from dreamplus.core import seeded, toy_images
from dreamplus.data.core import to_float
from dreamplus.loop.distill import distill
from dreamplus.loop.loops import make_matcher
from dreamplus.match.core import View
from dreamplus.match.experts import train_experts
from dreamplus.recipes import METHODS, recipe
from dreamplus.data.sources import load_data
from dreamplus.nets.zoo import create_net, has_batch_norm

PATHS = 'mtt', 'tesla'
LEAST = dict(ipc=2, width=8, inner=2, log=None)
TINY = LEAST | dict(batch_real=6, net_batch=8)
CHANGES = {'representative': dict(sampler='representative'), 'subcluster': dict(sampler='subcluster', subsample=2),
           'start': dict(start='k-means'), 'noise': dict(start='noise'),
           'match': dict(match='gradient + 0.5*embedding'),
           'three': dict(match='0.1*attention + feature + 2*embedding'),
           'both': dict(match='bidirectional', sampler='representative', start='herding')}

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(classes=3, per_class=30, size=16))

@pytest.fixture(scope='module')
def experts(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('experts')
    return dict(experts=str(train_experts(data, out, n=1, epochs=3, width=8, log=None).path), max_start=1, syn_steps=2,
                expert_epochs=1, zca=False)

def moved(data, method, **kw):
    "How far a run of four updates brings the images from where they begin; the same start for the same seed"
    first, last = (distill(data, method, outer=n, **kw).pixels for n in (1, 3))
    assert last.isfinite().all()
    return (first - last).abs().max().item()

@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize('method', [m for m in METHODS if m not in PATHS])
def test_any_sampler_start_and_loss(data, method, change):
    few = dict(n_data=12) if METHODS[method]['args'].get('n_data', 1) else {}
    assert moved(data, method, **TINY | few | change) > 0

@pytest.mark.parametrize('change', [dict(start='k-means'), dict(match='trajectory + 0.5*embedding'),
                                    dict(match='2*trajectory + gradient', sampler='representative')], ids=str)
@pytest.mark.parametrize('method', PATHS)
def test_trajectories_take_a_start_and_another_term(data, experts, method, change):
    assert moved(data, method, **(TINY if 'match' in change else LEAST) | experts | change) > 0

@pytest.mark.parametrize('method, change, reason', [
    ('mtt', dict(sampler='representative'), "at which match='trajectory' does not look"),
    ('dc', dict(warm_epochs=1), 'warm_epochs=1 are on real data'),
    ('dm', dict(subsample=2), "sampler='random' has no centres"),
    ('dsa', dict(match='gradients'), 'is not a sum of gradient, embedding'),
    ('dream+', dict(start='best'), "start='best' is unknown"),
    ('dm', dict(sampler='subcluster', subsample=2, batch_real=5), 'batch_real=5 is not a multiple'),
    ('dm', dict(compiled=True), "'compiled' is for networks that are trained, or choose images; leave it"),
    ('mtt', dict(batch_real=5), "'batch_real' is for looking at real images, not for match='trajectory'; leave it"),
    ('mtt', dict(distance='l1', match='trajectory + gradient', n_data=5), "'n_data' is for networks that are trained"),
    ('idc', dict(p=1.), "'p' is for other matchers, not for match='gradient'"),
    ('datadam', dict(p_channel=1.), "'p_channel' is for other matchers"),
    ('idc', dict(syn_steps=3), "'syn_steps' is for trajectory matching, not for match='gradient'"),
    ('dm', dict(interval=5), "'interval' is for samplers that cluster, not for sampler='random'"),
    ('idc', dict(candidates=8), "'candidates' is for samplers that cluster"),
    ('dream', dict(candidates=2, batch_real=4), 'candidates=2 is below batch=4, the images to choose'),
    ('idc', dict(net_epochs=5), "'net_epochs' is not for networks with net_on='real'"),
    ('dsa', dict(n_data=5), "'n_data' is not for networks with net_on='synthetic'"),
    ('idc', dict(match='trajectory'), "match='trajectory' learns the rate of its student; say where it begins"),
    ('dream', dict(match='trajectory + embedding'), "learns the rate of its student")])
def test_what_makes_no_sense_is_refused(data, experts, method, change, reason):
    path = 'trajectory' in (change.get('match'), METHODS[method]['args'].get('match'))
    given = (LEAST if path else TINY) | change
    if method == 'mtt': given |= experts
    with pytest.raises(ValueError, match=reason): distill(data, method, **given)


@pytest.mark.parametrize('method', ['dc', 'dsa'])
def test_an_added_embedding_pulls(data, method):
    "beside gradients compared by cosine, of which only signs would be left to an embedding"
    with seeded(0): net = create_net('convnet', 1, 3, 16, width=8)
    x, y = data.train.x.unflatten(0, (3, 21)).float()/255, torch.arange(3) # the rest is the test split
    def gradient(distance):
        syn = x[:, :2].clone().requires_grad_()
        matcher = make_matcher('embedding', distance=distance)
        loss = matcher(View(net, x[:, 10:], y, graph=False), View(net, syn, y)).sum()
        return torch.autograd.grad(loss, syn)[0]
    own = recipe(method, 'toys')['distance']
    assert own == 'cos' and gradient('mse').norm() > 0 and torch.equal(gradient(own), gradient('mse'))

@pytest.mark.parametrize('method, dataset, ipc, expected', [
    ('mtt', 'imagenette', 1, dict(arch='convnet', width=128)),
    ('dream+', 'imagenette', 1, dict(arch='resnetap10', width=64)),
    ('mtt', 'cifar100', 10, dict(stats='cifar10', zca=False, syn_steps=20)),
    ('mtt', 'cifar10', 10, dict(syn_steps=30, zca=True)),
    ('datadam', 'imagewoof', 10, dict(balance=.02)), ('datadam', 'tinyimagenet', 10, dict(balance=.01)),
    ('datadam-code', 'imagewoof', 10, dict(balance=.01)), ('atom', 'cifar10', 1, dict(zca=True)),
    ('idc', 'imagenet100', 10, dict(batch_real=128, net_batch=128)),
    ('dream+', 'tinyimagenet', 10, dict(rule='tiny', start='tiny')),
    ('dream', 'tinyimagenet', 10, dict(rule='nearest', start='k-means')),
    ('idc', 'imagesmine', 20, dict(arch='convnet', decode='single')), ('atom', 'cifarlike', 1, dict(zca=False))])
def test_published_exceptions(method, dataset, ipc, expected):
    "a folder of one's own whose name begins like a dataset's is none of them"
    assert expected.items() <= recipe(method, dataset, ipc).items()

def test_one_image_a_cell_of_tinyimagenet_begins_at_centres():
    assert recipe('dream+', 'tinyimagenet', 10, factor=1)['start'] == 'k-means'

def test_raw_features_choose_the_start_too(data):
    "the released code embeds pixels that were not normalised"
    starts = {raw: distill(data, 'dream', outer=1, lr=0., raw_features=raw, **TINY).pixels for raw in (False, True)}
    assert not torch.equal(starts[False], starts[True])

class BatchNormCB(Callback):
    "Computes the loss of an update under batch norm again, by a plain loop"
    def __init__(self, data, by_hand): self.data, self.by_hand, self.seen = data, by_hand, []
    def after_loss(self):
        real, draw, net = self.yb
        self.seen.append(has_batch_norm(net))
        real, syn = (self.data.normalize(x) for x in (to_float(self.data.train.x[real]), self.model.pixels.detach()))
        expected = self.by_hand(net, real, syn) # of (C,N,ch,h,w)
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
    ('dm', joint_embedding, True, {}), ('dc', rowwise_cosine, False, {}), ('dsa', rowwise_cosine, False, {}),
    ('idc', apart_l2, True, dict(n_data=12, factor=1, distance='mse', net_augment=''))])
def test_batch_norm_as_each_code_has_it(data, method, by_hand, mixes, change):
    "DM: over all classes. DC and DSA: frozen, so that chunks make no difference. IDC: within a class."
    for chunk in (None,) if mixes else (None, 1, 0):
        check = BatchNormCB(data, by_hand)
        distill(data, method, outer=2, norm='batch', augment='', chunk=chunk, cbs=[check], **TINY | change)
        assert check.seen == [mixes]*4

def test_choices_of_gradients_and_blocks(data):
    "What DC's and IDC's codes offer beside their own choice"
    for change in dict(bias=True), dict(flat=True), dict(bias=True, flat=True), dict(match='feature', block=0):
        own = moved(data, 'dc', **TINY | change)
        assert own > 0 and own != moved(data, 'dc', **TINY | {k: v for k, v in change.items() if k == 'match'})
    with pytest.raises(ValueError, match='block=7 is none of the'):
        distill(data, 'dc', match='feature', block=7, **TINY)
