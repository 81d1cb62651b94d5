"Matchers against a plain loop over classes, layers and rows, in float64: the loss and its gradients."
import weakref
from inspect import signature

import pytest
import torch
import torch.nn.functional as F

from torch import nn

from dreamplus.arguments import arguments
from dreamplus.core import seeded
from dreamplus.match import core
from dreamplus.match.attention import AttentionMatcher
from dreamplus.match.bidirectional import Bidirectional
from dreamplus.match.core import (DISTANCES, MATCHERS, Matcher, Sum, View, by_class,
                                  make_matcher, match_terms, with_gradient)
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

def chunked(matcher, net, real, syn, y, chunk=1):
    "The loss of each class, `chunk` classes at a time"
    def loss(parts, classes):
        return matcher(View(net, real[classes], y[classes], graph=False), View(net, parts[0], y[classes]))
    return by_class(loss, (syn.flatten(0, 1),), [syn.shape[1]]*len(syn), chunk)

def agree(ours, expected, inputs):
    "Two losses (C,) and their gradients with respect to `inputs` are equal to 1e-6 relative"
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    up = torch.tensor([1., -2, .5])
    for a, b in zip(*(torch.autograd.grad((l*up).sum(), inputs, retain_graph=True) for l in (ours, expected))):
        assert (a - b).norm() <= 1e-6*b.norm()

def same(matcher, net, term, real, syn, y, *chunks):
    "The matcher's loss and pixel gradient are those of `term`, for chunks of these sizes"
    expected = slow(term, real, syn, y)
    for chunk in chunks or [1]: agree(chunked(matcher, net, real, syn, y, chunk), expected, [syn])

@pytest.mark.parametrize('name', DISTANCES)
def test_distances(name):
    for shape in (6, 5, 3, 3), (6, 5), (6,):
        a, b = torch.randn(2, C, *shape, dtype=torch.float64)
        expected = torch.stack([slow_distance(name, p, q) for p, q in zip(a, b)])
        torch.testing.assert_close(DISTANCES[name](a, b), expected)

# Gradients

@pytest.mark.parametrize('name', DISTANCES)
def test_gradient_matching(name):
    net, (real, syn, y) = network(), images()
    same(GradientMatcher(name), net, lambda r, s, c: slow_gradient(net, r, s, c, name), real, syn, y, 1, 2, 5)

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

class Standardised(nn.Conv2d):
    "A convolution with a weight that is computed from its parameter"
    def forward(self, x): return self._conv_forward(x, self.weight/self.weight.norm(), self.bias)

class Written(nn.Module):
    "A network as people write them: activations overwrite the outputs of convolutions"
    def __init__(self, channels, classes, size, kind=nn.Conv2d, tokens=False):
        super().__init__()
        conv = lambda cin: [kind(cin, 4, 3, padding=1), nn.ReLU(inplace=True)]
        mixed = [nn.Linear(size, size, bias=False)]*tokens # of the pixels of a row
        self.body = nn.Sequential(*conv(channels), *mixed, *conv(4), nn.Flatten())
        self.head = nn.Linear(4*size**2, classes)
    def embed(self, x): return self.body(x)
    def logits(self, e): return self.head(e)
    def forward(self, x): return self.logits(self.embed(x))

NETWORKS |= dict(in_place=lambda: Written(3, 5, 8).double(),
                 standardised=lambda: Written(3, 5, 8, Standardised).double())
TRAINED_BATCH_NORM = 'batch', 'resnet'

@pytest.mark.parametrize('name', NETWORKS)
def test_other_networks(name):
    "among them batch norm, which sees the images of one class and one side at a time"
    net, (real, syn, y) = NETWORKS[name](), images(channels=3)
    chunks = (1,) if name in TRAINED_BATCH_NORM else (1, 3)
    same(GradientMatcher('l1'), net, lambda r, s, c: slow_gradient(net, r, s, c, 'l1'), real, syn, y, *chunks)
    same(EmbeddingMatcher('mse'), net, lambda r, s, c: slow_embedding(net, r, s, 'mse'), real, syn, y, *chunks)

def test_linear_layers_of_several_axes():
    net, (real, syn, y) = Written(1, 5, 8, tokens=True).double(), images()
    same(GradientMatcher(fc=True), net, lambda r, s, c: slow_gradient(net, r, s, c, 'mse', fc=True), real, syn, y, 1, 3)

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
def test_embedding_matching(name):
    net, (real, syn, y) = network(channels=3), images(channels=3)
    same(EmbeddingMatcher(name), net, lambda r, s, c: slow_embedding(net, r, s, beside(name)), real, syn, y, 1, 2, 3)

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
    torch.testing.assert_close(chunked(EmbeddingMatcher(), net, real, syn, y, chunk=C), ((a - b)**2).sum(1))

# Both

@pytest.mark.parametrize('name', DISTANCES)
@pytest.mark.parametrize('norm, chunk', [('instance', 3), ('batch', 1)])
def test_bidirectional(name, norm, chunk):
    net, (real, syn, y) = network(norm), images()
    def term(r, s, c): return slow_gradient(net, r, s, c, name) + .7*slow_embedding(net, r, s, beside(name))
    same(GradientMatcher(name) + .7*EmbeddingMatcher(name), net, term, real, syn, y, chunk)
    views = View(net, real, y, graph=False), View(net, syn, y)
    torch.testing.assert_close(Bidirectional(name)(*views), (GradientMatcher(name) + EmbeddingMatcher(name))(*views))

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

# Soft labels

def slow_soft(net, real, syn, y, targets, name):
    sides = []
    for x, t in (real, F.one_hot(torch.full((len(real),), y), 5).double()), (syn, targets):
        loss = -sum((row*net(image[None])[0].log_softmax(0)).sum() for row, image in zip(t, x))/len(x)
        sides.append([g for g in torch.autograd.grad(loss, list(net.parameters()), create_graph=True) if g.dim() == 4])
    return sum(slow_distance(name, a.detach(), b) for a, b in zip(*sides))

COUNTS = [2, 2, 3] # synthetic images of each class

def uneven(matcher, net, real, syn, targets, y, chunk):
    "The loss of each class of unevenly many synthetic images with learned labels"
    def loss(parts, classes):
        syn = View(net, parts[0], y[classes], targets=parts[1])
        return matcher(View(net, real[classes], y[classes], graph=False), syn)
    return by_class(loss, (syn, targets), COUNTS, chunk)

@pytest.mark.parametrize('name', DISTANCES)
def test_uneven_classes_and_learned_labels(name):
    net, (real, syn, y) = network(), images()
    syn = syn.detach().flatten(0, 1)[:sum(COUNTS)].requires_grad_()
    targets = torch.randn(sum(COUNTS), 5, dtype=torch.float64).softmax(1).requires_grad_()
    matcher = GradientMatcher(name) + EmbeddingMatcher(name)
    rows = zip(real, syn.split(COUNTS), y.tolist(), targets.split(COUNTS))
    expected = torch.stack([slow_soft(net, r, s, c, t, name) + slow_embedding(net, r, s, beside(name))
                            for r, s, c, t in rows])
    for chunk in 1, 2, 3: agree(uneven(matcher, net, real, syn, targets, y, chunk), expected, [syn, targets])

def test_labels_that_do_not_matter_have_no_gradient():
    net, (real, syn, y) = network(), images()
    syn, targets = (t.detach().requires_grad_() for t in (syn.flatten(0, 1)[:7], torch.rand(7, 5).double()))
    loss = uneven(EmbeddingMatcher(), net, real, syn, targets, y, 2).sum()
    gx, gt = torch.autograd.grad(loss, (syn, targets))
    assert gx.any() and not gt.any()

# Matchers as modules

class Weighted(Matcher):
    "A coupled matcher with a parameter and a buffer, which needs no real images"
    separable, needs_real = False, False
    def __init__(self, freqs: int = 4): # How many directions
        self.scale = nn.Parameter(torch.ones(freqs))
        self.register_buffer('seen', torch.zeros(()))
    def terms(self, real, syn): return dict(spread=self.scale.sum()*syn.embed.mean((1, 2)))

def test_state_of_matchers(monkeypatch):
    "Parameters and buffers are in the state of any sum; arguments are found in the signature"
    monkeypatch.setitem(MATCHERS, 'weighted', Weighted)
    a, b = (make_matcher('gradient + 0.5*weighted', dict(freqs=3, distance='l1')) for _ in range(2))
    assert list(a.state_dict()) == ['parts.1.scale', 'parts.1.seen'] and a.parts[1].scale.shape == (3,)
    assert list(arguments(Weighted)) == list(signature(Weighted).parameters) == ['freqs']
    a.parts[1].scale.data.fill_(7)
    b.load_state_dict(a.state_dict())
    assert torch.equal(b.parts[1].scale, a.parts[1].scale)
    assert (a.separable, a.needs_real, a.backward, a.joint) == (False, True, True, False)
    alone = make_matcher('weighted')
    assert not alone.needs_real and alone(None, View(network(), images()[1], torch.arange(C))).shape == (C,)

def test_flags_of_sums():
    total = GradientMatcher() + AttentionMatcher()
    assert (total.backward, total.joint, total.separable, total.needs_real) == (True, False, True, True)
    assert (EmbeddingMatcher() + AttentionMatcher()).joint
    class Whole(Matcher): whole = True
    for make in lambda: 2*Whole(), lambda: GradientMatcher() + Whole():
        with pytest.raises(ValueError, match='Whole compares whole sets'): make()

def test_spelling():
    terms = match_terms(' gradient+ 0.5*embedding + -1 * feature')
    assert terms == [(1, 'gradient'), (.5, 'embedding'), (-1, 'feature')]
    made = make_matcher('2*bidirectional + embedding', dict(distance='l1', block=0, p=1.))
    assert isinstance(made, Sum) and made.weights == [2, 2, 1]
    assert isinstance(make_matcher('bidirectional', dict(distance='cos')), Bidirectional)
    for text, says in {'gradients': "did you mean 'gradient'", 'x*gradient': "the weight 'x'",
                       'nan*gradient': 'not a number', 'gradient +': "match='' is unknown",
                       'embedding*2': "weight 'embedding'"}.items():
        with pytest.raises(ValueError, match=says): make_matcher(text)

# By class

def test_by_class_leaves_nothing_behind():
    net, (real, syn, y) = network(), images()
    with torch.no_grad(): quiet = chunked(Bidirectional(), net, real, syn, y)
    loud = chunked(Bidirectional(), net, real, syn, y)
    assert torch.equal(quiet, loud) and not quiet.requires_grad
    assert torch.equal(chunked(Bidirectional(), net, real, syn.detach(), y), quiet)
    grad, = torch.autograd.grad(loud.pow(2).sum(), syn, create_graph=True)
    with pytest.raises(RuntimeError, match='twice'): grad.sum().backward() # it would be wrong, so there is none
    assert all(p.grad is None for p in net.parameters())

def test_by_class_frees_each_graph():
    net, (_, syn, y) = network(), images()
    alive, seen = [], []
    def loss(parts, classes):
        alive.append(sum(ref() is not None for ref in seen))
        embed = View(net, parts[0], y[classes]).embed
        seen.append(weakref.ref(embed))
        return embed.mean((1, 2))
    by_class(loss, (syn.flatten(0, 1),), [SYN]*C)
    assert alive == [0, 0, 0]

def test_chunks_hold_equally_many_images():
    seen = []
    def loss(parts, classes):
        seen.append((classes.start, classes.stop, *parts[0].shape))
        return parts[0].sum(1)
    x = torch.arange(12., requires_grad=True)
    value = by_class(loss, (x,), [2, 2, 2, 1, 1, 4], chunk=2)
    assert seen == [(0, 2, 2, 2), (2, 3, 1, 2), (3, 5, 2, 1), (5, 6, 1, 4)]
    assert value.tolist() == [1, 5, 9, 6, 7, 38]
    assert torch.autograd.grad((value*torch.arange(6.)).sum(), x)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 5, 5]

@pytest.mark.parametrize('counts', [[4, 4], [4, 4, 5], [0, 6, 6]])
def test_wrong_counts(counts):
    with pytest.raises(ValueError, match='their sum must be the number of images, 12'):
        by_class(lambda parts, classes: parts[0].sum(1), (torch.zeros(12),), counts)

def test_a_known_gradient():
    x, y = torch.rand(3, 2, requires_grad=True), torch.rand(())
    loss = with_gradient(torch.tensor(2.), (x, y), (torch.ones(3, 2), torch.ones(())))
    (5*loss).backward()
    assert loss == 2 and torch.equal(x.grad, torch.full((3, 2), 5.)) and y.grad is None

@pytest.mark.parametrize('make', [GradientMatcher, EmbeddingMatcher, Bidirectional])
def test_unknown_distance(make):
    with pytest.raises(ValueError, match="distance='l2' is unknown; use one of mse, l1, l1_mean, cos"): make('l2')
