"Expert trajectories that are killed, continued and refused; trajectory matching against slow unrollings in float64."
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import TrainEvalCallback
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from processes import Process
from torch import nn

import dreamplus.match.experts as experts_module
from dreamplus.nets.augment import Augment
from dreamplus.core import RunFolder, rng_state, seeded, set_rng_state, toy_images
from dreamplus.data.core import to_float
from dreamplus.match.experts import _DSA, Experts, to_vector, train_experts
from dreamplus.match.trajectory import FORMS, ExpertCB, SpaceCB, TrajectoryLoss
from dreamplus.nets.convnet import ConvNet
from dreamplus.data.sources import load_data
from dreamplus.synthetic import SyntheticSet
from dreamplus.data.whiten import ZCA, whitened

@pytest.fixture(autouse=True)
def _seed():
    with seeded(0): yield

def toys(**kw): return load_data(toy_images(**dict(classes=3, per_class=12, seed=3) | kw))
def folder(path): return {p.name: p.read_bytes() for p in path.iterdir() if p.name != '.lock'}
make = partial(train_experts, n=3, epochs=3, batch=16, lr=.05, width=4, log=None)

# Experts

@pytest.fixture(scope='module')
def made(tmp_path_factory): return make(toys(), tmp_path_factory.mktemp('experts')/'whole').path

def die_at(call, path): # killed at that call of `train`, one an epoch
    calls, train = [], experts_module.train
    def dying(*args, **kw):
        calls.append(1)
        if len(calls) == call: os.kill(os.getpid(), signal.SIGKILL)
        return train(*args, **kw)
    experts_module.train = dying
    make(toys(), path)

@pytest.mark.parametrize('call, finished', [(1, 0), (5, 1), (9, 2)])
def test_killed_and_run_again(tmp_path, made, call, finished):
    path = tmp_path/'run'
    assert Process(die_at, call, path).end() == (None, -signal.SIGKILL)
    assert len(Experts(path)) == finished
    (path/'.expert_0002.safetensors.77.tmp').write_bytes(b'half') # what a kill within a write leaves
    make(toys(), path)
    assert folder(path) == folder(made)

def test_each_expert_is_its_seed(tmp_path, made):
    later = make(toys(), tmp_path/'later', n=2, seed=1)
    for k in 0, 1: assert torch.equal(later[k]['tau'], Experts(made)[k + 1]['tau'])

def test_the_generator_is_left_alone(tmp_path):
    before = rng_state()
    make(toys(), tmp_path/'run', n=1)
    assert torch.equal(rng_state()['cpu'], before['cpu'])

def test_a_trajectory_by_hand(made):
    "one batch an epoch and no momentum: every epoch is a step, by autograd on the whole set"
    data, expert = toys(), None
    with seeded(7):
        net = ConvNet(1, 3, 8, width=4)
        tau, losses = experts_module.train_expert(net, data, epochs=8, batch=99, augment='', decay=True)
    with seeded(7): net = ConvNet(1, 3, 8, width=4)
    x, y, expert = data.normalize(to_float(data.train.x)), data.train.y, [to_vector(net)]
    for epoch in range(8):
        loss = F.cross_entropy(net(x), y)
        assert losses[epoch].item() == pytest.approx(loss.item(), rel=1e-4)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads): p -= (.01 if epoch <= 5 else .001)*g # 8//2 + 1 = 5
        expert.append(to_vector(net))
    torch.testing.assert_close(tau, torch.stack(expert), rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('data, kw, says', [
    (dict(seed=4), {}, 'data digest='), (dict(classes=2), {}, 'another network'),
    ({}, dict(width=8), 'another network'),
    ({}, dict(norm='none'), 'another network'), ({}, dict(epochs=4), 'epochs=3, not 4'),
    ({}, dict(seed=1), 'seed=0, not 1'), ({}, dict(augment='crop'), "augment='color"),
    ({}, dict(decay=True), 'decay=False'), ({}, dict(lr=.1), 'lr=0.05')])
def test_other_experts_are_refused(made, data, kw, says):
    before = folder(made)
    with pytest.raises(ValueError, match=says): make(toys(**data), made, **kw)
    assert folder(made) == before

@pytest.mark.parametrize('change, says', [
    (whitened, 'whitened=False, not True'), (lambda d: d.with_stats(([.5], [.5])), 'data mean='),
    (lambda d: d.hold_out(.2), 'held=None')])
def test_data_seen_in_another_way_is_refused(made, change, says):
    with pytest.raises(ValueError, match=says): Experts(made).check(change(toys()))

@pytest.mark.parametrize('kw, says', [
    (dict(n=0), 'n=0'), (dict(epochs=1.5), 'epochs=1.5'), (dict(batch=0), 'batch=0'), (dict(lr=0), 'lr=0'),
    (dict(lr=float('nan')), 'lr=nan'), (dict(seed=-1), 'seed=-1'), (dict(augment='sharpen'), 'sharpen'),
    (dict(arch='nothing'), "arch='nothing'"), (dict(width=0), 'width=0')])
def test_bad_arguments_leave_nothing_behind(tmp_path, kw, says):
    with pytest.raises(ValueError, match=says): make(toys(), tmp_path/'run', **kw)
    assert not (tmp_path/'run').exists()

def test_other_folders_are_left_alone(tmp_path):
    (tmp_path/'mine').write_text('mine')
    for path, says in (tmp_path, 'not empty'), (tmp_path/'mine', 'is a file'):
        with pytest.raises(ValueError, match=says): make(toys(), path)
    assert folder(tmp_path) == dict(mine=b'mine')

def test_one_writer(made):
    with RunFolder(made).acquire(), pytest.raises(ValueError, match='written by another process'): make(toys(), made)

def test_damaged_files(tmp_path):
    experts = make(toys(), tmp_path/'run', n=1)
    experts.files[0].write_bytes(experts.files[0].read_bytes()[:99])
    for read in (lambda: experts.pair(0, 0, 1)), (lambda: experts[0]):
        with pytest.raises(ValueError, match='expert_0000.safetensors is damaged'): read()
    (experts.path/'experts.json').write_text('{')
    with pytest.raises(ValueError, match='experts.json is not JSON'): Experts(experts.path)

# The loss

NETS = dict(instance=dict(), none=dict(norm='none'), layer=dict(norm='layer', act='swish'), batch=dict(norm='batch'))

def case(norm='instance', data=None, **kw):
    "A loss in float64 and what it takes"
    data = data or toys(channels=3)
    net, start, target = (ConvNet(3, 3, 8, width=4, **NETS[norm]).double() for _ in range(3))
    syn = torch.rand(3, 2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(.3, dtype=torch.float64, requires_grad=True)
    return partial(TrajectoryLoss, data, net, **kw), (syn, to_vector(start), to_vector(target), lr), start

def gradients(loss, args, seed=1):
    with seeded(seed): value = loss(*args)
    return value.detach(), *torch.autograd.grad(3*value, (args[0], args[-1]))

def same(a, b, tolerance=1e-9):
    for p, q in zip(a, b): assert (p - q).norm() <= tolerance*q.norm()

def unroll(net, data, steps, batch, cut, syn, start, target, lr, augment=''):
    "Parameter by parameter, image by image"
    y = [c for c in range(len(syn)) for _ in syn[c]]
    x, aug = [data.normalize(image) for row in syn for image in row], Augment(augment, 'one')
    batches = []
    while len(batches) < steps: batches += torch.randperm(len(x)).split(batch)
    draws = [aug.draw(len(i), 8, same_op=True) for i in batches[:steps]]
    weights, k = {}, 0
    for name, p in net.named_parameters():
        weights[name], k = start[k:k + p.numel()].view(p.shape).clone().requires_grad_(), k + p.numel()
    for i, draw in zip(batches, draws):
        at = {name: w.detach().requires_grad_() if cut else w for name, w in weights.items()}
        logits = torch.func.functional_call(net, at, (aug(torch.stack([x[j] for j in i]), draw),))
        loss = -sum(row.log_softmax(0)[y[j]] for row, j in zip(logits, i))/len(i)
        grads = torch.autograd.grad(loss, list(at.values()), create_graph=True)
        weights = {name: w - lr*g for (name, w), g in zip(weights.items(), grads)}
    end = torch.cat([w.flatten() for w in weights.values()])
    return ((end - target)**2).sum()/((start - target)**2).sum()

@pytest.mark.parametrize('norm', NETS)
@pytest.mark.parametrize('batch, augment', [(None, ''), (4, ''), (4, _DSA), (2, 'crop')])
def test_forms(norm, batch, augment):
    loss, args, net = case(norm, steps=7, batch=batch, augment=augment)
    ours = {form: gradients(loss(form=form), args) for form in FORMS}
    slow = [partial(unroll, net, toys(channels=3), 7, batch or 6, cut, augment=augment) for cut in (False, True)]
    exact, cut = (gradients(s, args) for s in slow)
    for form, expected in dict(plain=exact, rebuilt=exact, tesla=cut).items(): same(ours[form], expected)
    assert (exact[1] - cut[1]).norm() > 1e-3*exact[1].norm() # what TESLA leaves out is not nothing

def test_by_finite_differences():
    loss, (syn, start, target, lr), _ = case(steps=5, batch=4, augment='crop_color')
    def value(x, rate):
        with seeded(1), torch.no_grad(): return loss()(x, start, target, rate).item()
    _, gx, glr = gradients(loss(), (syn, start, target, lr))
    direction, h = torch.randn_like(syn), 1e-6
    for change, g in ((0*syn, 1), glr), ((direction, 0), (gx*direction).sum()):
        ends = [value(syn + s*h*change[0], lr + s*h*change[1]) for s in (1, -1)]
        assert (ends[0] - ends[1])/(2*h) == pytest.approx(g.item()/3, rel=1e-4)

def test_whitened():
    data = whitened(toys(channels=3))
    loss, args, net = case(data=data, steps=4, augment='')
    same(gradients(loss(), args), gradients(partial(unroll, net, data, 4, 6, False), args))

@pytest.mark.parametrize('form', FORMS)
def test_limits(form):
    loss, (syn, start, target, lr), _ = case(steps=3, form=form)
    assert loss(steps=0)(syn, start, target, lr) == 1
    assert loss()(syn, start, target, 0*lr) == 1
    assert loss()(syn, start, target, lr) != loss()(syn, start, target, lr) # augmented anew

def test_in_float32():
    "whole runs are in float32, where the forms differ by rounding only"
    loss, (syn, *rest, lr), _ = case(steps=20)
    single = [t.detach().float() for t in (syn, *rest, lr)]
    for t in single[0], single[-1]: t.requires_grad_()
    same(gradients(loss(), single), gradients(loss(form='plain'), single), 1e-3)

# In the loop

class Batches(SimpleNamespace):
    device = torch.device('cpu')
    train = property(lambda self: self)
    def __getitem__(self, i): return (self, ())[i]
    def __len__(self): return self.n
    def __iter__(self): yield from [(torch.arange(3), torch.arange(3))]*self.n

def test_expert_cb(made):
    experts, seen = Experts(made), []
    cb = ExpertCB(experts, max_start=2, expert_epochs=2)
    cb.learn = SimpleNamespace(model=SimpleNamespace(lr=torch.tensor(.1)), dls=SimpleNamespace(device='cpu'))
    for _ in range(60):
        state = rng_state()
        cb.before_batch()
        start, target, lr = cb.learn.yb
        found = [(k, t) for k in range(3) for t in range(2) if torch.equal(start, experts[k]['tau'][t])]
        (k, t), = found
        assert torch.equal(target, experts[k]['tau'][t + 2]) and lr is cb.model.lr
        seen += found
    assert len(set(seen)) == 6
    set_rng_state(state)
    cb.before_batch()
    assert torch.equal(cb.learn.yb[0], start) # its only state is the generator's

def test_no_expert_was_finished(tmp_path):
    experts = make(toys(), tmp_path/'run', n=1)
    experts.files[0].unlink()
    with pytest.raises(ValueError, match='no finished expert'): ExpertCB(Experts(tmp_path/'run'), 1, 1)

@pytest.mark.parametrize('see', [lambda d: d, whitened])
def test_a_run_in_pixels_is_a_run_in_the_reference_s_space(made, see):
    data, experts = see(toys()), Experts(made)
    loss, start = TrajectoryLoss(data, experts.make(), steps=4, augment=''), torch.rand(3, 2, 1, 8, 8)
    model = SyntheticSet(start)
    model.lr = nn.Parameter(torch.tensor(.05))
    sgd = partial(torch.optim.SGD, momentum=.5)
    def two_groups(groups, lr, **_): return OptimWrapper([dict(params=p, lr=r) for p, r in zip(groups, lr)], opt=sgd)
    learn = Learner(Batches(n=5), model, loss, lr=[.5, 1e-4], opt_func=two_groups, default_cbs=False,
                    splitter=lambda m: [[m.pixels], [m.lr]],
                    cbs=[TrainEvalCallback, ExpertCB(experts, 2, 2), SpaceCB(data)])
    with seeded(5): learn.fit(1)

    z, lr = data.normalize(start).requires_grad_(), torch.tensor(.05, requires_grad=True)
    pixels = data.zca.inverse if see is whitened else lambda z: z*data.std + data.mean
    opt = torch.optim.SGD([dict(params=[z], lr=.5), dict(params=[lr], lr=1e-4)], momentum=.5)
    with seeded(5):
        for _ in range(5):
            k, t = (int(torch.randint(n, ())) for n in (3, 2))
            opt.zero_grad()
            loss(pixels(z), *experts.pair(k, t, 2), lr).backward()
            opt.step()
    torch.testing.assert_close(model.pixels.detach(), pixels(z).detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.lr.detach(), lr.detach(), rtol=1e-3, atol=1e-5)
    assert (model.pixels - start).abs().max() > .01

# Whitening

def test_whitening_by_singular_values():
    x = torch.randint(256, (40, 3, 4, 4), dtype=torch.uint8)
    zca, rows = ZCA(x, ridge=.05), x.flatten(1).double()/255
    centred = rows - rows.mean(0)
    u, s, _ = torch.linalg.svd(centred.T@centred/39)
    torch.testing.assert_close(zca.white.double(), u@((s + .05)**-.5).diag()@u.T, rtol=1e-4, atol=1e-4)
    z = zca(to_float(x)).flatten(1).double()
    torch.testing.assert_close(z, centred@u@((s + .05)**-.5).diag()@u.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(zca.inverse(zca(to_float(x))), to_float(x), rtol=1e-4, atol=1e-5)

def test_many_images_at_a_time():
    x = torch.randint(256, (5000, 1, 3, 3), dtype=torch.uint8) # more than are summed at once
    torch.testing.assert_close(ZCA(x, ridge=0).white@to_float(x).flatten(1).T.cov()@ZCA(x, ridge=0).white, torch.eye(9),
                               rtol=1e-3, atol=1e-3)
