"Matchers against a plain loop over classes, layers and rows, in float64: the loss and its gradient in the pixels."
import weakref

import pytest
import torch
import torch.nn.functional as F

from dreamplus.core import seeded
from dreamplus.match import core
from dreamplus.match.bidirectional import Bidirectional
from dreamplus.match.core import DISTANCES, View, by_class, get_distance
from dreamplus.match.distribution import EmbeddingMatcher, FeatureMatcher
from dreamplus.match.gradient import GradientMatcher, matched_weights
from dreamplus.nets.convnet import ConvNet, ResNet

@pytest.fixture(autouse=True)
def _seed():
    with seeded(0): yield

C, REAL, SYN = 3, 7, 4

def images(channels=1, size=8):
    "Real (C,7,ch,h,w) and synthetic (C,4,ch,h,w) images, and their classes, which are not the first ones nor in order"
    x = torch.randn(C, REAL + SYN, channels, size, size, dtype=torch.float64)
    return x[:, :REAL], x[:, REAL:].clone().requires_grad_(), torch.tensor([4, 0, 2])

def network(norm='instance', channels=1, size=8, **kw):
    return ConvNet(channels, 5, size, width=4, norm=norm, **kw).double()

# The oracle: distances row by row, everything else class by class

def slow_distance(name, a, b):
    if name == 'mse': return ((a - b)**2).sum()
    if name == 'l1': return (a - b).abs().sum()
    rows = [(p.reshape(-1), q.reshape(-1)) for p, q in zip(a, b)]
    if name == 'l1_mean': return sum((p - q).abs().mean() for p, q in rows)
    return sum(1 - (p*q).sum()/(p.norm()*q.norm() + 1e-6) for p, q in rows)

def slow_gradient(net, real, syn, y, name, bias=False, fc=False, flat=False):
    sides = []
    for x in real, syn:
        loss = sum(F.cross_entropy(net(x), torch.full((len(x),), y), reduction='none'))/len(x)
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        sides.append([g for g in grads if g.dim() == 4 or (bias and g.dim() == 1) or (fc and g.dim() == 2)])
    if flat: sides = [[torch.cat([g.reshape(-1) for g in side])[None]] for side in sides]
    return sum(slow_distance(name, a.detach(), b) for a, b in zip(*sides))

def slow_embedding(net, real, syn, name):
    return slow_distance(name, net.embed(real).detach().mean(0), net.embed(syn).mean(0))

def slow(term, real, syn, y): return torch.stack([term(real[c], syn[c], int(y[c])) for c in range(len(y))])

def same(matcher, net, term, real, syn, y, chunk=1):
    "The matcher's loss and pixel gradient are those of `term`, to 1e-5 relative"
    def loss(s, part): return matcher(View(net, real[part], y[part], graph=False), View(net, s, y[part]))
    ours, expected, up = by_class(loss, syn, chunk), slow(term, real, syn, y), torch.tensor([1., -2, .5])
    assert ((ours - expected).abs() <= 1e-5*expected.abs()).all()
    a, b = (torch.autograd.grad((l*up).sum(), syn)[0] for l in (ours, expected))
    assert (a - b).norm() <= 1e-5*b.norm()

@pytest.mark.parametrize('name', DISTANCES)
@pytest.mark.parametrize('shape', [(6, 5, 3, 3), (6, 5), (6,)])
def test_distances(name, shape):
    a, b = torch.randn(2, C, *shape, dtype=torch.float64)
    expected = torch.stack([slow_distance(name, p, q) for p, q in zip(a, b)])
    torch.testing.assert_close(get_distance(name)(a, b), expected)

# Gradients

@pytest.mark.parametrize('name', DISTANCES)
@pytest.mark.parametrize('chunk', [1, 2, 5])
def test_gradient_matching(name, chunk):
    net, (real, syn, y) = network(), images()
    same(GradientMatcher(name), net, lambda r, s, c: slow_gradient(net, r, s, c, name), real, syn, y, chunk)

@pytest.mark.parametrize('name', ['mse', 'cos'])
@pytest.mark.parametrize('kw', [dict(bias=True), dict(fc=True), dict(bias=True, fc=True, flat=True), dict(flat=True)])
def test_which_layers(name, kw):
    net, (real, syn, y) = network(channels=3), images(channels=3)
    same(GradientMatcher(name, **kw), net, lambda r, s, c: slow_gradient(net, r, s, c, name, **kw), real, syn, y)

NETWORKS = dict(
    layer=lambda: network('layer', 3), group=lambda: network('group', 3, act='swish'), none=lambda: network('none', 3),
    batch=lambda: network('batch', 3), batch_eval=lambda: network('batch', 3).eval(),
    max_pool=lambda: network(channels=3, pool='max'),
    resnet=lambda: ResNet(10, 3, 5, 8, norm='batch', width=4).double())

TRAINED_BATCH_NORM = 'batch', 'resnet'

@pytest.mark.parametrize('name, chunk', [(name, chunk) for name in NETWORKS for chunk in (1, 3)
                                         if chunk == 1 or name not in TRAINED_BATCH_NORM])
def test_other_networks(name, chunk):
    "among them batch norm, which sees the images of one class and one side at a time"
    net, (real, syn, y) = NETWORKS[name](), images(channels=3)
    same(GradientMatcher('l1'), net, lambda r, s, c: slow_gradient(net, r, s, c, 'l1'), real, syn, y, chunk)
    same(EmbeddingMatcher('mse'), net, lambda r, s, c: slow_embedding(net, r, s, 'mse'), real, syn, y, chunk)

@pytest.mark.parametrize('matcher', [GradientMatcher(), GradientMatcher('cos', fc=True), Bidirectional()])
def test_several_classes_take_one_backward_pass(matcher, monkeypatch):
    "of either side: a loop over classes would go back through all of them for each"
    def loop(*_): raise AssertionError('class by class')
    monkeypatch.setattr(core, '_by_loop', loop)
    net, (real, syn, y) = network(), images()
    matcher(View(net, real, y, graph=False), View(net, syn, y)).sum().backward()
    assert syn.grad.abs().sum() > 0

def test_matched_weights_of_the_papers_network():
    net = ConvNet(3, 10, 32)
    assert sum(p.numel() for p in matched_weights(net).values()) == 298_368
    assert sum(p.numel() for p in matched_weights(net, bias=True, fc=True).values()) == 320_010
    assert list(matched_weights(net, fc=True))[-1] == 'classifier.weight'

def test_the_real_side_is_a_constant():
    net, (real, syn, y) = network(), images()
    real = real.clone().requires_grad_()
    Bidirectional()(View(net, real, y, graph=False), View(net, syn, y)).sum().backward()
    assert real.grad is None and syn.grad.abs().sum() > 0

# Embeddings and features

def beside(name): return 'mse' if name == 'cos' else name # an embedding has no rows to take cosines of

@pytest.mark.parametrize('name', DISTANCES)
@pytest.mark.parametrize('channels, chunk', [(1, 1), (3, 2), (3, 3)])
def test_embedding_matching(name, channels, chunk):
    net, (real, syn, y) = network(channels=channels), images(channels)
    same(EmbeddingMatcher(name), net, lambda r, s, c: slow_embedding(net, r, s, beside(name)), real, syn, y, chunk)

@pytest.mark.parametrize('block', [0, 1, -1])
def test_feature_matching(block):
    net, (real, syn, y) = network(), images()
    def term(r, s, c):
        a, b = (net.features(x)[block].mean(0) for x in (r, s))
        return ((a.detach() - b)**2).sum()
    same(FeatureMatcher(block), net, term, real, syn, y)

def test_batch_norm_over_all_classes_is_one_pass():
    "as DM does it: the statistics are those of all images of a side"
    net, (real, syn, y) = network('batch'), images()
    a, b = (net.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1) for x in (real, syn))
    def loss(s, part): return EmbeddingMatcher()(View(net, real[part], y[part], graph=False), View(net, s, y[part]))
    torch.testing.assert_close(by_class(loss, syn, chunk=C), ((a - b)**2).sum(1))

# Both

@pytest.mark.parametrize('name', DISTANCES)
@pytest.mark.parametrize('norm, chunk', [('instance', 3), ('batch', 1)])
def test_bidirectional(name, norm, chunk):
    net, (real, syn, y) = network(norm), images()
    def term(r, s, c): return slow_gradient(net, r, s, c, name) + .7*slow_embedding(net, r, s, beside(name))
    same(Bidirectional(name, weight=.7), net, term, real, syn, y, chunk)
    same(GradientMatcher(name) + .7*EmbeddingMatcher(name), net, term, real, syn, y, chunk)

def test_sums():
    net, (real, syn, y) = network(), images()
    views = View(net, real, y, graph=False), View(net, syn, y)
    g, e = GradientMatcher(), EmbeddingMatcher('l1')
    total = 2*(g + .5*e) + e
    torch.testing.assert_close(total(*views), 2*g(*views) + 2*e(*views))
    assert list(total.terms(*views)) == [*matched_weights(net), 'embed']
    assert total.backward and g.backward and not (e + e).backward

def test_one_forward_pass_a_side():
    net, (real, syn, y) = network(), images()
    calls = []
    net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    (EmbeddingMatcher() + GradientMatcher())(View(net, real, y, graph=False), View(net, syn, y))
    assert len(calls) == 2

# The seam

def test_by_class_leaves_nothing_behind():
    net, (real, syn, y) = network(), images()
    def loss(s, part): return Bidirectional()(View(net, real[part], y[part], graph=False), View(net, s, y[part]))
    with torch.no_grad(): quiet = by_class(loss, syn)
    loud = by_class(loss, syn)
    assert torch.equal(quiet, loud) and not quiet.requires_grad
    grad, = torch.autograd.grad(loud.pow(2).sum(), syn, create_graph=True)
    with pytest.raises(RuntimeError, match='twice'): grad.sum().backward() # it would be wrong, so there is none
    assert all(p.grad is None for p in net.parameters())

def test_by_class_frees_each_graph():
    net, (_, syn, y) = network(), images()
    alive, seen = [], []
    def loss(s, part):
        alive.append(sum(ref() is not None for ref in seen))
        embed = View(net, s, y[part]).embed
        seen.append(weakref.ref(embed))
        return embed.mean((1, 2))
    by_class(loss, syn)
    assert alive == [0, 0, 0]

@pytest.mark.parametrize('make', [GradientMatcher, EmbeddingMatcher, Bidirectional])
def test_unknown_distance(make):
    with pytest.raises(ValueError, match="distance='l2' is unknown; use one of mse, l1, l1_mean, cos"): make('l2')
