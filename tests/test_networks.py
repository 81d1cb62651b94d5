"Networks against written-out arithmetic, and over all sizes."
import pytest
import torch
import torch.nn.functional as F

from dreamplus.core import seeded
from dreamplus.nets.convnet import ConvNet, ResNet, ResNetAP
from dreamplus.nets.zoo import create_net

NAMES = 'convnet', 'resnet10', 'resnet18', 'resnetap10', 'resnetap18'

def parameters(net): return sum(p.numel() for p in net.parameters())
def images(n, channels, size): return torch.randn(n, channels, size, size, dtype=torch.float64)

@pytest.mark.parametrize('net, count', [
    (lambda: ConvNet(3, 10, 32), 320_010), (lambda: ConvNet(3, 100, 32), 504_420),
    (lambda: ConvNet(1, 10, 28), 317_706), (lambda: ConvNet(3, 200, 64), 857_160),
    (lambda: ResNet(10, 3, 10, 32), 1_228_970),
    (lambda: ResNet(10, 3, 10, 32, width=64), 4_903_242), (lambda: ResNetAP(10, 3, 10, 224), 4_910_922)])
def test_published_parameter_counts(net, count): assert parameters(net()) == count

@pytest.mark.parametrize('size, depth', [(8, 2), (16, 2), (28, 3), (32, 3), (64, 4), (128, 5)])
@pytest.mark.parametrize('channels', [1, 2, 3])
def test_depth_follows_size(size, depth, channels):
    net = ConvNet(channels, 10, size, width=4)
    assert len(net.features(torch.zeros(2, channels, size, size))) == depth

@pytest.mark.parametrize('size', [4, 5, 7, 9, 20, 100])
@pytest.mark.parametrize('channels', [1, 3])
def test_odd_sizes(size, channels):
    assert ConvNet(channels, 5, size, width=4)(torch.randn(2, channels, size, size)).shape == (2, 5)

NORMS = dict(none=lambda h: h, instance=lambda h: standard(h, (2, 3)), layer=lambda h: standard(h, (1, 2, 3)),
             batch=lambda h: standard(h, (0, 2, 3)),
             group=lambda h: standard(h.unflatten(1, (4, -1)), (2, 3, 4)).flatten(1, 2))
ACTS = dict(relu=lambda h: h.clamp(min=0), leakyrelu=lambda h: torch.where(h > 0, h, .01*h),
            sigmoid=lambda h: 1/(1 + (-h).exp()), swish=lambda h: h/(1 + (-h).exp()))
POOLS = dict(none=lambda h: h, avg=lambda h: quarters(h).mean(-1), max=lambda h: quarters(h).amax(-1))

def standard(h, dims): return (h - h.mean(dims, keepdim=True))/(h.var(dims, keepdim=True, correction=0) + 1e-5).sqrt()
def quarters(h): return torch.stack([h[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)

@pytest.mark.parametrize('norm, act, pool', [
    *((n, 'relu', 'avg') for n in NORMS), *(('instance', a, 'avg') for a in ACTS),
    *(('group', 'swish', p) for p in POOLS)])
@pytest.mark.parametrize('channels, pad', [(1, 3), (3, 1)])
def test_convnet_written_out(norm, act, pool, channels, pad):
    net = ConvNet(channels, 5, 12, width=8, depth=2, norm=norm, act=act, pool=pool).double()
    x = h = images(3, channels, 12)
    for i, feature in enumerate(net.features(x)):
        conv = net.blocks[i].conv
        h = F.conv2d(h, conv.weight, conv.bias, padding=1 if i else pad)
        h = POOLS[pool](ACTS[act](NORMS[norm](h)))
        torch.testing.assert_close(feature, h)
    torch.testing.assert_close(net(x), h.flatten(1)@net.classifier.weight.T + net.classifier.bias)

def test_resnetap_written_out():
    "Convolve at every pixel, then average, then normalise, on both paths"
    net, x = ResNetAP(10, 3, 5, 16, width=4).double(), images(2, 3, 16)
    weights = iter([p for p in net.parameters() if p.ndim == 4])
    conv = lambda h: F.conv2d(h, w := next(weights), padding=w.shape[-1]//2)
    norm, mean = NORMS['instance'], POOLS['avg']
    h = norm(conv(x)).relu()
    for stage, feature in enumerate(net.features(x)):
        down = mean if stage else lambda h: h
        main = norm(conv(norm(down(conv(h))).relu()))
        h = (main + (norm(down(conv(h))) if stage else h)).relu()
        torch.testing.assert_close(feature, h)
    torch.testing.assert_close(net.embed(x), h.mean((2, 3)))

@pytest.mark.parametrize('arch', NAMES)
@pytest.mark.parametrize('channels, size', [(1, 16), (1, 28), (3, 32), (3, 65), (3, 129)])
def test_contract(arch, channels, size):
    net = create_net(arch, channels, 4, size, width=4).double().eval()
    x = images(2, channels, size)
    e, features = net.embed(x), net.features(x)
    assert e.shape == (2, net.classifier.in_features) and net(x).shape == (2, 4)
    torch.testing.assert_close(net(x), net.logits(e))
    last = features[-1] if arch == 'convnet' else features[-1].mean((2, 3))
    torch.testing.assert_close(e, last.flatten(1))
    assert (e[0] - e[1]).abs().max() > 1e-6 # images can be told apart

@pytest.mark.parametrize('size, sides', [(64, [64, 32, 16, 8]), (128, [64, 32, 16, 8]), (224, [56, 28, 14, 7])])
@pytest.mark.parametrize('make', [ResNet, ResNetAP])
def test_stems(make, size, sides):
    with torch.device('meta'):
        features = make(10, 3, 10, size, width=4).features(torch.zeros(2, 3, size, size))
    assert [f.shape[-1] for f in features] == sides

def test_resnets_start_as_published():
    for p in [p for p in ResNet(10, 3, 10, 32).parameters() if p.ndim == 4]:
        assert p.std().item() == pytest.approx((2/(p.shape[-1]**2*p.shape[0]))**.5, rel=.1)

def test_seed_fixes_weights_and_leaves_the_generator():
    before = torch.get_rng_state()
    for arch in NAMES:
        with seeded(3): a = create_net(arch, 3, 10, 32, width=4)
        with seeded(3): b = create_net(arch, 3, 10, 32, width=4)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert torch.equal(torch.get_rng_state(), before)

@pytest.mark.parametrize('arch, channels, size, kw, message', [
    ('vgg', 3, 32, {}, 'use one of convnet, resnet10'), ('convnet', 0, 32, {}, 'channels=0 must be'),
    ('convnet', 3, 32., {}, 'size=32.0 must be'),
    ('convnet', 3, 1, {}, 'size=1 is too small for a ConvNet; load larger images'),
    ('convnet', 3, 3, {}, 'depth=2 is too large for 3 pixels, which each block halves; use 1 or less'),
    ('convnet', 3, 32, dict(depth=0), 'depth=0 must be'), ('convnet', 3, 32, dict(act='gelu'), "act='gelu' is unknown"),
    ('resnet10', 3, 4, {}, 'size=4 is too small'), ('resnet10', 1, 8, dict(norm='instance'), 'at least 16 pixels'),
    ('resnet10', 3, 32, dict(width=0), 'width=0 must be'), ('resnet18', 3, 32, dict(norm='in'), 'use one of instance'),
    ('resnet18', 3, 32, dict(depth=3), "resnet18 takes no argument 'depth'; it takes norm, width")])
def test_errors(arch, channels, size, kw, message):
    with pytest.raises(ValueError, match=message): create_net(arch, channels, 10, size, **kw)

def test_resnet_depth():
    with pytest.raises(ValueError, match='depth=34 is not available; use 10 or 18'): ResNet(34, 3, 10, 32)
