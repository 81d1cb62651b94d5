"Every network by name, on every size; foreign modules; batch norm in every matcher."
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from torch import nn

from dreamplus.core import seeded, toy_images
from dreamplus.data.sources import load_data
from dreamplus.judge.evaluate import score
from dreamplus.loop.distill import distill, resume
from dreamplus.match.core import View, by_class, make_matcher
from dreamplus.match.experts import train_experts
from dreamplus.match.gradient import matched_weights
from dreamplus.nets.convnet import Net
from dreamplus.nets.facts import network_facts
from dreamplus.nets.zoo import ARCHS, Hooked, check_trainable, create_net, has_batch_norm, network

def parameters(net): return sum(p.numel() for p in net.parameters())
def images(n, channels, size): return torch.randn(n, channels, size, size, dtype=torch.float64)

# One table: every name, every size, grey and in colour

NARROW = {name: dict(width=8) for name in ('convnet', 'resnet10', 'resnet18', 'resnetap10', 'resnetap18')}

@pytest.mark.parametrize('arch', [*ARCHS, 'efficientnet_b0', 'shufflenet_v2_x0_5', 'regnet_x_400mf'])
def test_every_size(arch):
    for channels, size in (1, 28), (3, 64):
        net = create_net(arch, channels, 7, size, **NARROW.get(arch, {})).eval().requires_grad_(False)
        x = torch.randn(2, channels, size, size)
        e, features = net.embed(x), net.features(x)
        assert e.shape == (2, net.classifier.in_features) and net(x).shape == (2, 7)
        torch.testing.assert_close(net(x), net.logits(e))
        assert (e[0] - e[1]).norm() > 1e-6*e.norm() # images can be told apart
        assert features and all(len(f) == 2 for f in features)
        if arch not in ('mlp', 'lenet'): assert all(f.ndim == 4 for f in features)

@pytest.mark.parametrize('kw', [dict(norm=n) for n in ('none', 'batch', 'layer', 'group')] +
                         [dict(act=a) for a in ('leakyrelu', 'sigmoid', 'swish')] +
                         [dict(pool='max'), dict(pool='none', depth=2), dict(depth=4), dict(width=5, norm='none')],
                         ids=str)
def test_every_convnet(kw):
    for size in 28, 32, 64:
        for channels in 1, 3:
            net = create_net('convnet', channels, 7, size, **dict(width=8) | kw)
            x = torch.randn(2, channels, size, size)
            e = net.embed(x)
            assert e.shape == (2, net.classifier.in_features) and net(x).shape == (2, 7)
            torch.testing.assert_close(net.logits(e), net(x))

def test_a_function_with_a_name_is_a_network_like_any_other(tmp_path, monkeypatch):
    def mine(channels, classes, size):
        return nn.Sequential(nn.Flatten(), nn.Linear(channels*size*size, 9), nn.ReLU(), nn.Linear(9, classes))
    data = load_data('digits', fraction=.9)
    args = dict(method='dream+', outer=1, inner=2, n_data=8, batch_real=4, log=None)
    with pytest.raises(ValueError, match='must be a name'):
        distill(data, arch=mine, **args)
    monkeypatch.setitem(ARCHS, 'mine', mine)
    dset = distill(data, arch='mine', match='embedding', out=tmp_path/'run', **args)
    assert torch.equal(resume(tmp_path/'run', data, log=None).pixels, dset.pixels)
    row, = score(dset, data, n=1, rows=('distilled',), epochs=0, steps=3)
    assert dset.evaluation['arch'] == 'mine' and 0 <= row['acc'] <= 1

@pytest.mark.parametrize('arch, channels, classes, size, kw, count', [
    ('convnet', 3, 10, 32, {}, 320_010), ('convnet', 3, 100, 32, {}, 504_420), ('convnet', 1, 10, 28, {}, 317_706),
    ('convnet', 3, 200, 64, {}, 857_160), ('resnet10', 3, 10, 32, {}, 1_228_970),
    ('resnet10', 3, 10, 32, dict(width=64), 4_903_242), ('resnetap10', 3, 10, 224, {}, 4_910_922),
    ('densenet', 3, 10, 32, {}, 1_000_618)])
def test_published_parameter_counts(arch, channels, classes, size, kw, count):
    assert parameters(create_net(arch, channels, classes, size, **kw)) == count

@pytest.mark.parametrize('arch', ['googlenet', 'inception_v3', 'mobilenet_v3_small', 'resnet34', 'vgg11_bn',
                                  'convnext_tiny', 'vit_b_32', 'swin_t'])
def test_families_of_torchvision(arch):
    with torch.device('meta'): # shapes only
        net = create_net(arch, channels=1, classes=7, size=28) # the harder of the two above: grey, and enlarged
        assert net.logits(net.embed(torch.zeros(2, 1, 28, 28))).shape == (2, 7)

# Written out

STAGES = dict(lenet='CPCP', alexnet='CPCPCCCP', vgg11='CPCPCCPCCPCCP') # convolutions and poolings
PADS = dict(lenet=[0, 0], alexnet=[2, 2, 1, 1, 1], vgg11=[1]*8)

@pytest.mark.parametrize('arch', STAGES)
@pytest.mark.parametrize('channels, size', [(1, 28), (3, 32), (3, 30)])
def test_written_out(arch, channels, size):
    net, x = create_net(arch, channels, 5, size).double(), images(2, channels, size)
    h, ws = x, [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    pads = [PADS[arch][0] + 2*(channels == 1), *PADS[arch][1:]]
    convs = iter(zip(ws, pads))
    for step in STAGES[arch]:
        if step == 'P': # a pooling of an odd side takes what is there, but LeNet's
            if arch != 'lenet': h = F.pad(h, (0, h.shape[-1] % 2, 0, h.shape[-1] % 2), value=-torch.inf)
            h = F.max_pool2d(h, 2)
            continue
        m, pad = next(convs)
        h = F.conv2d(h, m.weight, m.bias, padding=pad)
        if arch == 'vgg11':
            mean, var = h.mean((2, 3), keepdim=True), h.var((2, 3), keepdim=True, correction=0)
            h = (h - mean)/(var + 1e-5).sqrt()
        h = h.relu()
    h = h.flatten(1)
    for m in ws[len(pads):-1]: h = F.linear(h, m.weight, m.bias).relu()
    torch.testing.assert_close(net.embed(x), h)
    torch.testing.assert_close(net(x), F.linear(h, ws[-1].weight, ws[-1].bias))

def test_small_images_are_enlarged():
    net = create_net('densenet121', 1, 3, 28).eval()
    x = torch.randn(2, 1, 28, 28)
    bigger = F.interpolate(x, size=29, mode='bilinear') # torchvision's least for a DenseNet
    assert torch.equal(net(x), net(bigger)) and not torch.equal(net(bigger), net(bigger.flip(3)))

def test_seed_fixes_weights_and_leaves_the_generator():
    before = torch.get_rng_state()
    for arch in 'lenet', 'densenet', 'mnasnet0_5':
        with seeded(3): a = create_net(arch, 1, 10, 32)
        with seeded(3): b = create_net(arch, 1, 10, 32)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert torch.equal(torch.get_rng_state(), before)

# Networks of one's own

def order(size, classes, channels): return nn.Sequential(nn.Flatten(), nn.Linear(channels*size**2, classes))
def other(channels, classes, size, hidden=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels*size**2, hidden), nn.ReLU(), nn.Linear(hidden, classes))
def softmax(channels, classes, size): return nn.Sequential(order(size, classes, channels), nn.Softmax(1))
def tokens(channels, classes, size): return nn.Sequential(nn.Flatten(2), nn.Linear(size**2, classes))
def broken(channels, classes, size): return nn.Sequential(nn.Flatten(), nn.Linear(9, classes))

def test_the_part_makes_networks_for_the_data():
    data = load_data('digits')
    net = network(data, width=4, depth=1)()
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10) and len(net.blocks) == 1
    assert network(load_data('digits', size=28), 'lenet')().classifier.in_features == 84
    with pytest.raises(ValueError, match="takes no argument 'depth'"): network(data, 'lenet', depth=2)()

def test_a_function_of_ones_own():
    net, x = create_net(order, 3, 4, 8), torch.randn(2, 3, 8, 8)
    assert isinstance(net, Hooked) and torch.equal(net.embed(x), x.flatten(1)) and net.training
    assert create_net(other, 3, 4, 8, hidden=6).embed(x).shape == (2, 6)
    assert len(net.state_dict()) == 2 and not net.module[1]._forward_hooks
    mine = create_net('convnet', 3, 4, 8)
    assert create_net(lambda channels, classes, size: mine, 3, 4, 8) is mine # answers already

@pytest.mark.parametrize('arch, kw, message', [
    ('resnet19', {}, 'use one of convnet, resnet10.* or a torchvision network'),
    (other, dict(width=9), "takes no argument 'width'; it takes hidden"),
    ('mlp', dict(norm='batch'), "takes no argument 'norm'"),
    ('mlp', dict(width=0), 'width=0 must be an integer of'), ('vgg11', dict(norm='in'), 'use one of instance'),
    ('vit_b_32', dict(norm='in'), 'use one of instance'), ('squeezenet1_0', dict(norm='layer'), 'has no batch norm'),
    ('squeezenet1_0', {}, 'does not end in a linear layer'), (softmax, {}, 'does not end in a linear layer'),
    (tokens, {}, 'does not end in a linear layer'), (broken, {}, 'fails on images of 3x32x32')])
def test_errors(arch, kw, message):
    with pytest.raises(ValueError, match=message): create_net(arch, 3, 10, 32, **kw)

@pytest.mark.parametrize('arch, size, kw', [('lenet', 8, {}), ('vgg11', 16, {}), ('densenet', 7, {}),
                                            ('densenet', 15, dict(norm='instance'))])
def test_too_small(arch, size, kw):
    with pytest.raises(ValueError, match=f'{size=} is too small'): create_net(arch, 3, 10, size, **kw)

# Networks as other people write them

class Plain(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.fc, self.aux = nn.Linear(24, num_classes), nn.Linear(24, num_classes)
    def forward(self, x): return self.fc(self.body(x))
    def both(self, x): return self.fc(e := self.body(x)), self.aux(e), e

class Tuple(Plain):
    def forward(self, x): return self.both(x)
class FeaturesFirst(Plain):
    def forward(self, x): return self.both(x)[2], [self.both(x)[0]]
class Dictionary(Plain):
    def forward(self, x): return dict(features=self.body(x), out=dict(logits=self.fc(self.body(x))))
class OnlyInTraining(Plain):
    def forward(self, x): return self.both(x)[:2] if self.training else self.both(x)[0]
class Names(Plain):
    def __init__(self, n_classes, in_chans, img_size=32): super().__init__(n_classes)
class Answers(Plain):
    def embed(self, x): return self.body(x)
    def logits(self, e): return self.fc(e)
class Frozen(Plain):
    def __init__(self, num_classes=3, all=False):
        super().__init__(num_classes)
        (self if all else self.body).requires_grad_(False)

WORKS = [Tuple, FeaturesFirst, Dictionary, OnlyInTraining, Names, Answers, partial(Plain),
         lambda classes: Plain(classes), lambda **kw: Plain(kw['classes']), lambda *args: Plain(),
         lambda num_classes, **kw: Plain(num_classes, **kw)]

@pytest.fixture(scope='module')
def three(): return load_data(toy_images(3, 8, 12, 3))

SHORT = dict(outer=1, inner=2, factor=1, batch_real=4, log=None)

@pytest.mark.parametrize('method', ['dm', 'dsa'])
def test_all_these_are_the_same_network(three, monkeypatch, method):
    "so they distil the same pixels"
    found = []
    for arch in [Plain, *WORKS]:
        monkeypatch.setitem(ARCHS, 'mine', arch)
        own = dict(net_epochs=1) if method == 'dsa' else {}
        found.append(distill(three, method, arch='mine', **own, **SHORT).pixels)
    for pixels in found[1:]: torch.testing.assert_close(pixels, found[0])

def test_logits_are_those_of_the_classifier():
    x = torch.randn(2, 3, 12, 12)
    for cls in Tuple, FeaturesFirst, Dictionary, OnlyInTraining:
        net = create_net(cls, 3, 5, 12)
        for training in True, False:
            assert torch.equal(net.train(training)(x), net.module.fc(net.module.body(x)))
        assert torch.equal(net.embed(x), net.module.body(x)) and net.head == 'fc'

REFUSED = [
    (Plain(), 'arch is a network .Plain., but every run needs new ones; give its class'),
    (lambda channels, classes, size: Plain(2), 'gives 2 logits for 3 classes; give its last layer one output for each'),
    (lambda channels, classes, size: Answers(2), r'gives logits of shape \(1, 2\) for 1 image and 3 classes'),
    (lambda c, k, s: Plain(k), 'needs c, k, s, which a run does not supply; give a function of channels'),
    (lambda channels, classes, size: None, 'returned a NoneType; it must return a torch.nn.Module'),
    (lambda channels, classes, size: {}['x'], 'fails for .*KeyError.*change it'),
    (lambda classes: nn.Sequential(Plain(classes), nn.LogSoftmax(1)), 'does not end in a linear layer.*remove what'),
    (lambda classes: nn.Sequential(nn.Conv2d(1, classes, 3)), 'fails on images of 3x12x12.*load images of another'),
    (partial(Frozen, all=True), 'has no parameter that can be trained; set requires_grad')]

@pytest.mark.parametrize('arch, says', REFUSED, ids=lambda v: v[:20] if isinstance(v, str) else '')
def test_what_has_to_be_changed_is_said_in_a_line(arch, says):
    with pytest.raises(ValueError, match=says) as e: create_net(arch, 3, 3, 12)
    assert '\n' not in str(e.value)

def test_a_frozen_backbone(three, monkeypatch, tmp_path):
    "Only trained weights are matched; trajectories need all of them"
    monkeypatch.setitem(ARCHS, 'mine', Frozen)
    for method in ('dm', 'dsa'): assert distill(three, method, arch='mine', **SHORT).pixels.isfinite().all()
    with pytest.raises(ValueError, match='or it is frozen .requires_grad=False.; use fc=True'):
        distill(three, 'idc', arch='mine', n_data=0, **SHORT)
    assert distill(three, 'idc', arch='mine', fc=True, n_data=0, **SHORT).pixels.isfinite().all()
    with seeded(0): net = create_net(Frozen, 3, 3, 12)
    assert [*matched_weights(net, bias=True, fc=True)] == ['module.fc.weight', 'module.fc.bias', 'module.aux.weight',
                                                          'module.aux.bias']
    with pytest.raises(ValueError, match='without frozen parameters, but module.body.0.weight of mine'):
        train_experts(three, tmp_path/'experts', 1, epochs=1, arch='mine', log=None)
    assert not (tmp_path/'experts').exists()

@pytest.mark.parametrize('arch', [Plain, Plain()], ids=['class', 'network'])
def test_a_run_needs_the_name_of_a_network(three, arch):
    with pytest.raises(ValueError, match='must be a name; register it under a name of your own') as e:
        distill(three, 'dm', arch=arch, **SHORT)
    assert '\n' not in str(e.value)

# What identifies a network

SCALE = 2

def variant(what):
    "A function that makes a network: all do the same, but for one thing"
    def pick(name): return 3 if what == name else 2
    value, stride, private, nested = map(pick, ('closure', 'stride', 'private', 'nested'))
    first, filled, default = map(pick, ('partial', 'buffer', 'default'))
    def inner(x): return x*value
    class Base(nn.Module):
        kind = pick('class attribute')
        def act(self, x): return x.relu()
    class Net(Base):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=stride), nn.Linear(4, 3)
            self._private, self.listed, self.part = private, [1, dict(a=nested)], partial(torch.mul, first)
            self.register_buffer('filter', torch.full((3,), float(filled)))
        @property
        def scale(self): return 2
        def forward(self, x, by=default): return self.fc(inner(self.act(self.conv(x))).mean((2, 3)))*by*SCALE
    if what == 'parent': Base.act = lambda self, x: x.sigmoid()
    if what == 'property': Net.scale = property(lambda self: 3)
    if what == 'call': Net.__call__ = lambda self, x: 2*nn.Module.__call__(self, x)
    def make():
        net = Net()
        if what == 'hook': net.fc.register_forward_hook(lambda m, x, out: out + 1)
        if what == 'weights': nn.init.zeros_(net.fc.bias)
        if what == 'frozen': net.conv.requires_grad_(False)
        return net
    return make

CHANGES = ['closure', 'class attribute', 'stride', 'private', 'nested', 'partial', 'buffer', 'hook', 'weights',
           'frozen', 'property', 'default', 'call', 'parent']

def code(make):
    with seeded(0): return network_facts(make())['code']

def test_every_change_makes_another_network():
    assert len({code(variant(change)) for change in [None, *CHANGES]}) == 1 + len(CHANGES)

def test_the_same_network_is_found_again():
    assert code(variant(None)) == code(variant(None))
    before = code(variant(None))
    torch.manual_seed(7)
    assert code(variant(None)) == before

def test_a_global_constant_is_part_of_a_network(monkeypatch):
    before = code(variant(None))
    monkeypatch.setitem(globals(), 'SCALE', 3)
    assert code(variant(None)) != before

# Batch norm

def stage(cin, *widths, pad=1):
    "As in VGG11, but narrow"
    layers = [(nn.Conv2d(a, b, 3, padding=pad), nn.BatchNorm2d(b), nn.ReLU()) for a, b in zip((cin, *widths), widths)]
    return nn.Sequential(*sum(layers, ()), nn.MaxPool2d(2, ceil_mode=True))

BATCH = {'resnet10': partial(create_net, 'resnet10', 1, 3, 8, width=4),
         'vgg': lambda: Net([stage(1, 4, pad=3), stage(4, 6, 6)], 6*3**2, 3),
         'densenet': partial(create_net, 'densenet', 1, 3, 8),
         'shufflenet': partial(create_net, 'shufflenet_v2_x0_5', 1, 3, 8)}

def class_loss(net, name, real, syn, c):
    "Of class c alone, with torch's functions only"
    if name == 'embedding': return (net.embed(real).mean(0).detach() - net.embed(syn).mean(0)).pow(2).sum()
    if name == 'feature': return (net.features(real)[-1].mean(0).detach() - net.features(syn)[-1].mean(0)).pow(2).sum()
    weights = [p for p in net.parameters() if p.ndim == 4]
    a, b = (torch.autograd.grad(F.cross_entropy(net(x), torch.full((len(x),), c)), weights, create_graph=True)
            for x in (real, syn))
    return sum((g.detach() - h).pow(2).sum() for g, h in zip(a, b))

@pytest.mark.parametrize('arch, match', [
    *((arch, match) for arch in ('resnet10', 'vgg') for match in ('gradient', 'embedding', 'feature')),
    ('densenet', 'embedding'), ('shufflenet', 'feature')]) # slow to differentiate twice
def test_batch_norm_sees_one_class_and_one_side_at_a_time(arch, match):
    "As the reference does; values and pixel gradients, in float64"
    with seeded(0): net, x = BATCH[arch]().double().train(), images(18, 1, 8)
    x, matcher = x.unflatten(0, (3, 6)), make_matcher(match)
    real, syn, y = x[:, :4], x[:, 4:].clone().requires_grad_(), torch.arange(3)
    def loss(parts, some): return matcher(View(net, real[some], y[some], graph=False), View(net, parts[0], y[some]))
    def losses(chunk=1): return by_class(loss, (syn.flatten(0, 1),), [2]*3, chunk)
    ours = losses()
    again = losses() # the running statistics have moved; they are not read
    slow = torch.stack([class_loss(net, match, real[c], syn[c], c) for c in range(3)])
    torch.testing.assert_close(ours, slow)
    assert torch.equal(again, ours)
    torch.testing.assert_close(*(torch.autograd.grad(l.sum(), syn)[0] for l in (ours, slow)), rtol=1e-5, atol=1e-10)
    assert not torch.allclose(losses(3), ours, rtol=1e-2) # another thing: all classes in one pass

def test_which_have_batch_norm():
    assert [a for a in ARCHS if has_batch_norm(create_net(a, 1, 3, 28))] == ['resnet10', 'resnet18', 'densenet']
    assert not has_batch_norm(create_net('shufflenet_v2_x0_5', 1, 3, 28, norm='layer'))

def test_check_leaves_the_network_alone():
    net = create_net('resnet10', 1, 3, 8, width=4).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    check_trainable(net, 1, 8, n=2)
    assert not net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match='the network fails in training'): check_trainable(net, 3, 8, n=2)

QUICK = dict(outer=2, inner=2, width=4, factor=1, batch_real=8, n_data=16, log=None)

@pytest.fixture(scope='module')
def digits(): return load_data('digits')

@pytest.mark.parametrize('kw, message', [
    (dict(arch='resnet10'), 'sees one pixel of size=8 images'),
    (dict(arch='resnet10', batch_real=1, ipc=2), 'sees one pixel of size=8 images'),
    (dict(arch='resnet10', ipc=2, chunk=3), 'chunk=3: with batch norm'),
    (dict(arch='resnet10', ipc=2, norm='instance'), 'needs at least 16 pixels'),
    (dict(arch='mlp'), 'no convolution to compare'), (dict(arch='vgg11', width=None), 'size=8 is too small'),
    (dict(arch='squeezenet1_1', width=None), 'does not end in a linear layer')])
def test_refused_before_there_is_a_folder(digits, tmp_path, kw, message):
    with pytest.raises(ValueError, match=message): distill(digits, 'idc', out=tmp_path/'run', **QUICK | kw)
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('kw', [dict(arch='resnet10', ipc=2), dict(arch='resnet10', chunk=3, match='embedding')])
def test_a_batch_norm_run_resumes_to_the_same_bits(tmp_path, kw):
    data = load_data(toy_images(classes=3, size=8))
    class StopCB(Callback):
        order = 90
        def after_batch(self): self.learn.checkpoint_cb.stop = self.dls.train.at == 3
    whole = distill(data, 'idc', **QUICK | kw)
    with pytest.raises(KeyboardInterrupt): distill(data, 'idc', out=tmp_path/'run', cbs=[StopCB()], **QUICK | kw)
    assert torch.equal(resume(tmp_path/'run', data, log=None).pixels, whole.pixels)
