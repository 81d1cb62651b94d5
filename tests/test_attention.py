"Attention matchers against maps written out by hand, in float64, loss and pixel gradient; and hard inputs."
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dreamplus.core import seeded
from dreamplus.match.attention import AttentionMatcher, AttentionMixer, channel_map, spatial_map
from dreamplus.match.core import View, by_class
from dreamplus.match.distribution import EmbeddingMatcher
from dreamplus.match.gradient import GradientMatcher
from dreamplus.nets.convnet import ConvNet, Net, ResNet

@pytest.fixture(autouse=True)
def _seed():
    with seeded(0): yield

C, REAL, SYN = 3, 7, 4
POWERS = 1, 2.5, 4

def images(channels=1, size=8, dtype=torch.float64):
    "Real (C,7,ch,h,w) and synthetic (C,4,ch,h,w) images, and their classes, which are not the first ones nor in order"
    x = torch.randn(C, REAL + SYN, channels, size, size, dtype=dtype)
    return x[:, :REAL], x[:, REAL:].clone().requires_grad_(), torch.tensor([4, 0, 2])

def network(norm='instance', channels=1, depth=3, **kw): return ConvNet(channels, 5, 8, 6, depth, norm, **kw).double()

def views(net, real, syn, y): return View(net, real, y, graph=False), View(net, syn, y)

def pixel_grad(matcher, net, real, syn, y):
    return torch.autograd.grad(matcher(*views(net, real, syn, y)).sum(), syn)[0]

# The oracle: layer by layer, image by image, with no hook

def layers(net, x): # What each ReLU puts out, and the embedding
    out = []
    for block in net.blocks:
        out.append(block.norm(block.conv(x)).clamp_min(0))
        x = F.avg_pool2d(out[-1], 2)
    return out, x.flatten(1)

def unit(z): return z.reshape(-1)/(z*z).sum().sqrt()
def mean(rows): return sum(rows)/len(rows)

def slow(net, real, syn, p, p_channel, channel, balance):
    "The loss of each class, where all classes go through the network together"
    sides = [layers(net, x.flatten(0, 1)) for x in (real.detach(), syn)]
    losses = []
    for c in range(C):
        parts = []
        for (maps, embed), n in zip(sides, (REAL, SYN)):
            mine = slice(c*n, c*n + n)
            spatial = [mean([unit(sum(k.abs()**p for k in f)) for f in a[mine]]) for a in maps[:-1]]
            channels = [mean([unit((f.abs()**p_channel).sum((1, 2))) for f in a[mine]]) for a in maps[:-1]]
            parts.append((spatial, channels, [mean(list(embed[mine]))]))
        squares = [sum(((a.detach() - b)**2).sum() for a, b in zip(r, s)) for r, s in zip(*parts)]
        losses.append(100*(squares[0] + channel*squares[1] + balance*squares[2]))
    return torch.stack(losses)

def chunked(matcher, net, real, syn, y, chunk):
    "The loss of each class, `chunk` classes at a time"
    def loss(parts, classes): return matcher(*views(net, real[classes], parts[0], y[classes]))
    return by_class(loss, (syn.flatten(0, 1),), [SYN]*C, chunk)

def same(matcher, net, real, syn, y, chunk, **kw):
    "The matcher's loss and pixel gradient are those of `slow`, to 1e-6 relative"
    ours, expected = chunked(matcher, net, real, syn, y, chunk), slow(net, real, syn, **kw)
    mixed = any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) # then a class's loss moves other classes' pixels
    up = torch.tensor([2., 2, 2] if mixed else [1., -2, .5])
    assert ((ours - expected).abs() <= 1e-6*expected.abs()).all()
    a, b = (torch.autograd.grad((l*up).sum(), syn)[0] for l in (ours, expected))
    assert (a - b).norm() <= 1e-6*b.norm()

NORMS = [('instance', 1), ('instance', 2), ('batch', C)] # and how many classes go in one pass

@pytest.mark.parametrize('norm, chunk', NORMS)
def test_spatial_attention(norm, chunk):
    for channels, p in (1, 2.5), (3, 4):
        same(AttentionMatcher(p, .02), network(norm, channels), *images(channels), chunk,
             p=p, p_channel=1, channel=0, balance=.02)

@pytest.mark.parametrize('norm, chunk', NORMS)
def test_mixed_attention(norm, chunk):
    for channels, p, p_channel in (1, 1, 4), (3, 4, 2.5):
        same(AttentionMixer(p, p_channel, .3, .02), network(norm, channels), *images(channels), chunk,
             p=p, p_channel=p_channel, channel=.3, balance=.02)

def test_published_constants():
    "the paper's power; 100 for a map and 1 for the embedding, as in the released code"
    net, (real, syn, y) = network(), images()
    same(AttentionMatcher(), net, real, syn, y, C, p=4, p_channel=1, channel=0, balance=.01)
    same(AttentionMixer(), net, real, syn, y, C, p=4, p_channel=4, channel=1, balance=.01)
    terms = AttentionMatcher().terms(*views(net, real, syn, y))
    assert list(terms) == ['spatial1', 'spatial2', 'embed'] # of three layers
    torch.testing.assert_close(terms['embed'], EmbeddingMatcher('mse')(*views(net, real, syn, y)))

def test_batch_norm_sees_all_images_of_a_side():
    net, (real, syn, y) = network('batch'), images()
    def losses(chunk): return chunked(AttentionMatcher(1), net, real, syn, y, chunk)
    assert torch.equal(losses(C), losses(1000)) and ((losses(1)/losses(C) - 1).abs() > 1e-3).any()

# What a view sees

NETWORKS = dict(
    swish=lambda: network(act='swish'), sigmoid=lambda: network('none', act='sigmoid'),
    leakyrelu=lambda: network('layer', act='leakyrelu', pool='max'),
    resnet=lambda: ResNet(10, 1, 5, 8, norm='batch', width=4).double(), batch_eval=lambda: network('batch').eval())

@pytest.mark.parametrize('name', NETWORKS)
def test_other_networks(name):
    "the maps are those of what each activation module puts out, whatever module that is"
    net, (real, syn, y) = NETWORKS[name](), images()
    def seen(x):
        out = []
        hooks = [m.register_forward_hook(lambda m, x, o: out.append(o.clone())) for m in net.modules()
                 if type(m).__module__ == nn.ReLU.__module__]
        net(x.flatten(0, 1))
        for h in hooks: h.remove()
        return out[:-1]
    def means(x): return [F.normalize(a.pow(4).sum(1).flatten(1)).unflatten(0, x.shape[:2]).mean(1) for a in seen(x)]
    expected = sum((a.detach() - b).pow(2).sum(1) for a, b in zip(means(real), means(syn)))
    terms = AttentionMatcher().terms(*views(net, real, syn, y))
    ours = sum(t for k, t in terms.items() if k != 'embed')/100
    torch.testing.assert_close(ours, expected)
    a, b = (torch.autograd.grad(l.sum(), syn)[0] for l in (ours, expected))
    assert (a - b).norm() <= 1e-5*b.norm()

class Reused(nn.Module):
    "One ReLU module for two places, in place, as torchvision writes it; and one without pixels"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc, self.act = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3), nn.Linear(32, 6), nn.ReLU(True)
    def forward(self, x): return self.act(self.fc(self.act(self.b(self.act(self.a(x)))).flatten(1)))[..., None, None]

def test_activations_in_order():
    net, (_, syn, y) = Net([Reused()], 6, 5).double(), images()
    block, x = net.blocks[0], syn.flatten(0, 1)
    first = block.a(x).relu()
    expected = [first, block.b(first).relu()]
    view = View(net, syn, y)
    assert len(view.activations) == 2 and view.embed.shape == (C, SYN, 6)
    for a, e in zip(view.activations, expected): torch.testing.assert_close(a.flatten(0, 1), e)

def test_no_hook_is_left():
    net, (_, syn, y) = network(), images()
    assert View(net, syn, y).activations
    with pytest.raises(RuntimeError): assert View(net, syn.float(), y).activations # not the network's type
    assert not any(m._forward_hooks for m in net.modules())

@pytest.mark.parametrize('first', [AttentionMatcher(), EmbeddingMatcher(), GradientMatcher()])
def test_one_forward_pass_a_side(first):
    net, (real, syn, y) = network(), images()
    calls, parts = [], [GradientMatcher(), EmbeddingMatcher(), AttentionMixer(), AttentionMatcher()]
    net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    sum(parts, first)(*views(net, real, syn, y))
    assert len(calls) == 2

def test_a_sum_with_gradients():
    net, (real, syn, y) = network(), images()
    g, a = GradientMatcher('l1'), AttentionMatcher()
    ours, expected = (torch.autograd.grad(l.sum(), syn)[0] for l in (
        (g + .5*a)(*views(net, real, syn, y)), g(*views(net, real, syn, y)) + .5*a(*views(net, real, syn, y))))
    torch.testing.assert_close(ours, expected)
    assert (g + .5*a).backward and not a.backward

def test_the_real_side_is_a_constant():
    net, (real, syn, y) = network(), images()
    real = real.clone().requires_grad_()
    AttentionMixer()(*views(net, real, syn, y)).sum().backward()
    assert real.grad is None and syn.grad.abs().sum() > 0

def test_by_class_frees_each_graph():
    net, (real, syn, y) = network(), images()
    alive, seen = [], []
    def loss(parts, classes):
        alive.append(sum(ref() is not None for ref in seen))
        pair = views(net, real[classes], parts[0], y[classes])
        seen.extend(weakref.ref(a) for v in pair for a in v.activations)
        return AttentionMatcher()(*pair)
    by_class(loss, (syn.flatten(0, 1),), [SYN]*C)
    assert alive == [0, 0, 0]

# Numbers that float32 has trouble with

@pytest.mark.parametrize('p', POWERS)
@pytest.mark.parametrize('size', [1e-2, 1e12])
def test_the_size_of_activations_does_not_count(p, size):
    "a network without a norm, its first layer scaled: the map of that layer and the gradient's direction stay"
    net, (real, syn, y) = ConvNet(1, 5, 8, 6, 2, 'none'), images(dtype=torch.float32)
    matcher = AttentionMixer(p, p, balance=0)
    before, grad = matcher(*views(net, real, syn, y)), pixel_grad(matcher, net, real, syn, y)
    for w in net.blocks[0].parameters(): w.data *= size
    after, again = matcher(*views(net, real, syn, y)), pixel_grad(matcher, net, real, syn, y)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert (again - grad).norm() <= 1e-3*grad.norm()

@pytest.mark.parametrize('p', POWERS)
@pytest.mark.parametrize('see', [spatial_map, channel_map])
def test_float32_agrees_with_float64(see, p):
    f = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64)
    for scale in 1e-2, 1, 1e9, 1e30:
        lo, hi = (scale*f).float().requires_grad_(), (scale*f).requires_grad_()
        z = F.normalize((hi/scale).abs().pow(p).sum(2 if see is spatial_map else (3, 4)).flatten(2), dim=2)
        torch.testing.assert_close(see(lo, p).double(), z, rtol=1e-4, atol=1e-5)
        up = torch.randn_like(z)
        a, b = (torch.autograd.grad((m*up).sum(), t)[0]*scale for m, t in ((see(lo, p), lo), (z, hi)))
        assert (a - b).norm() <= 1e-4*b.norm()

@pytest.mark.parametrize('p', POWERS)
@pytest.mark.parametrize('norm', ['instance', 'batch', 'none'])
def test_blank_images(norm, p):
    "all blank, and one blank image among others"
    net, (real, syn, y) = ConvNet(1, 5, 8, 6, 3, norm), images(dtype=torch.float32)
    for value, some in (0., False), (1., True), (0., True):
        blank = torch.full_like(syn, value)
        if some: blank[:, 1:] = syn[:, 1:].detach()
        blank.requires_grad_()
        loss = AttentionMixer(p, p)(*views(net, real, blank, y))
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), blank)[0].isfinite().all()

@pytest.mark.parametrize('p', POWERS)
@pytest.mark.parametrize('see', [spatial_map, channel_map])
def test_silent_maps(see, p):
    "zero is zero with no slope; below a thousandth a map fades instead of being blown up; above, its length is one"
    zero = torch.zeros(1, 1, 4, 3, 3, requires_grad=True)
    z = see(zero, p)
    assert not z.any() and not torch.autograd.grad(z.sum(), zero)[0].any()
    f = torch.zeros(1, 1, 4, 3, 3)
    f[..., 0, 0, 0] = 1
    for size, length in (1e-4, .1**p), (1e-3, 1), (1., 1):
        torch.testing.assert_close(see(size*f, p).norm(), torch.tensor(float(length)), rtol=1e-4, atol=1e-7)

# Errors

@pytest.mark.parametrize('make', [AttentionMatcher, AttentionMixer, lambda p: AttentionMixer(p_channel=p)])
@pytest.mark.parametrize('p', [0, .99, -4, float('nan')])
def test_unknown_power(make, p):
    with pytest.raises(ValueError, match=f'p={p} of the .* maps must be at least 1'): make(p)

@pytest.mark.parametrize('make', [AttentionMatcher, AttentionMixer])
def test_too_few_layers(make):
    real, syn, y = images()
    for net in network(depth=1), Net([nn.Conv2d(1, 2, 8)], 2, 5).double():
        with pytest.raises(ValueError, match='network with at least 2 activations'): make()(*views(net, real, syn, y))
