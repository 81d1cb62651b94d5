"Expert trajectories that are killed, continued and refused; trajectory matching against slow unrollings in float64."
import os
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from processes import Process
from torch import nn

import dreamplus.match.experts as experts_module
from dreamplus.core import Key, rng_state, seeded, toy_images
from dreamplus.data.core import to_float
from dreamplus.data.sources import load_data
from dreamplus.data.whiten import ZCA, precondition, whitened
from dreamplus.loop.callbacks import LoopCB
from dreamplus.loop.distill import distill, resume
from dreamplus.match.core import MATCHERS
from dreamplus.match.experts import Experts, to_vector, to_weights, train_experts
from dreamplus.match.trajectory import FORMS, TrajectoryMatcher, draw_batches
from dreamplus.nets.augment import DSA, Augment
from dreamplus.nets.convnet import ConvNet
from dreamplus.nets.zoo import ARCHS
from dreamplus.runs import RunFolder

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

@pytest.mark.parametrize('call, finished', [(1, 0), (5, 1)])
def test_killed_and_run_again(tmp_path, made, call, finished):
    path = tmp_path/'run'
    assert Process(die_at, call, path).end() == (None, -signal.SIGKILL)
    assert len(Experts(path)) == finished
    (path/'.dreamplus-0a1b2c3d.tmp').mkdir() # what a kill within a write leaves
    (path/'.dreamplus-0a1b2c3d.tmp'/'expert_0002.safetensors').write_bytes(b'half')
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
    for path, says in (tmp_path, 'holds files that are not experts'), (tmp_path/'mine', 'is a file'):
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

def case(norm='instance', augment=''):
    "A student's cross-entropy, and in float64: images, probabilities, start, target, learning rate"
    net, start, target = (ConvNet(3, 3, 8, width=4, **NETS[norm]).double() for _ in range(3))
    aug = Augment(augment, 'one')
    def ce(theta, x, y, draw):
        return F.cross_entropy(torch.func.functional_call(net, to_weights(net, theta), (aug(x, draw),)), y)
    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64).softmax(1)
    lr = torch.tensor(.3, dtype=torch.float64)
    return ce, net, [t.requires_grad_() for t in (x, y)], [to_vector(start), to_vector(target)], lr.requires_grad_()

def batches(steps, batch, augment='', seed=1):
    return draw_batches(6, 8, steps, batch, Augment(augment, 'one'), Key(seed))

def gradients(loss, ce, images, weights, lr, drawn):
    value = loss(ce, *images, *weights, lr, drawn)
    return value.detach(), *torch.autograd.grad(3*value, [t for t in (*images, lr) if t.requires_grad])

def same(a, b, tolerance=1e-9):
    for p, q in zip(a, b, strict=True): assert (p - q).norm() <= tolerance*q.norm()

def unroll(net, aug, cut, ce, x, y, start, target, lr, drawn):
    "Parameter by parameter, image by image; the cross-entropy is written out"
    weights, k = {}, 0
    for name, p in net.named_parameters():
        weights[name], k = start[k:k + p.numel()].view(p.shape).clone().requires_grad_(), k + p.numel()
    for i, draw in drawn:
        at = {name: w.detach().requires_grad_() if cut else w for name, w in weights.items()}
        logits = torch.func.functional_call(net, at, (aug(torch.stack([x[j] for j in i]), draw),))
        loss = -sum((row.log_softmax(0)*y[j]).sum() for row, j in zip(logits, i))/len(i)
        grads = torch.autograd.grad(loss, list(at.values()), create_graph=True)
        weights = {name: w - lr*g for (name, w), g in zip(weights.items(), grads)}
    end = torch.cat([w.flatten() for w in weights.values()])
    return ((end - target)**2).sum()/((start - target)**2).sum()

@pytest.mark.parametrize('norm, batch, augment', [
    ('instance', 6, ''), ('instance', 4, DSA), ('none', 2, 'crop'), ('layer', 4, DSA), ('batch', 4, '')])
def test_forms(norm, batch, augment):
    ce, net, *args = case(norm, augment)
    args.append(batches(5, batch, augment))
    ours = {name: gradients(form, ce, *args) for name, form in FORMS.items()}
    exact, cut = (gradients(partial(unroll, net, Augment(augment, 'one'), cut), ce, *args) for cut in (False, True))
    for name, expected in dict(plain=exact, rebuilt=exact, tesla=cut).items(): same(ours[name], expected)
    assert (exact[1] - cut[1]).norm() > 1e-3*exact[1].norm() # what TESLA leaves out is not nothing

def test_the_released_tesla_takes_half_the_step():
    "Its two statements, written out: the 2 repeats the tuple of autograd.grad, and its first entry is used"
    ce, _, (x, y), start, target, lr = *case()[:3], *case()[3], case()[4]
    drawn, theta, points, total = batches(5, 4), start.detach(), [], 0
    for i, draw in drawn:
        points.append(theta.clone().requires_grad_())
        g, = torch.autograd.grad(ce(points[-1], x[i], y[i], draw), points[-1])
        theta, total = theta - lr.item()*g, total + g
    far, grads = (start - target).pow(2).sum(), [torch.zeros_like(x), torch.zeros_like(x)]
    for point, (i, draw) in zip(points, drawn):
        g, = torch.autograd.grad(ce(point, x[i], y[i], draw), point, create_graph=True)
        along = (lr.item()*(target - start) + lr.item()**2*total)@g/far
        code = 2*torch.autograd.grad(along, x, retain_graph=True)
        assert len(code) == 2
        grads[0] += code[0] # as the code
        grads[1] += 2*code[0] # as meant
    for form, expected in zip(('tesla-code', 'tesla'), grads):
        x.grad = lr.grad = None
        FORMS[form](ce, x, y, start, target, lr, drawn).backward()
        same([x.grad], [expected])
        move = start - lr*total - target
        same([lr.grad], torch.autograd.grad(move.dot(move)/far, lr)) # equal in both

def test_hard_labels_are_a_special_case():
    ce, _, (x, y), *args = case()
    hard = torch.tensor([0, 0, 1, 1, 2, 2])
    drawn = batches(4, 4)
    for form in FORMS.values():
        onehot = F.one_hot(hard, 3).double()
        same(gradients(form, ce, (x, hard), *args, drawn), gradients(form, ce, (x, onehot), *args, drawn))

def test_by_finite_differences():
    ce, _, (x, y), weights, lr = case(augment='crop_color')
    drawn, form = batches(5, 4, 'crop_color'), FORMS['rebuilt']
    _, gx, gy, glr = gradients(form, ce, (x, y), weights, lr, drawn)
    dx, dy, h = torch.randn_like(x), torch.randn_like(y), 1e-6
    for changes, g in ((0, 0, 1), glr), ((dx, 0, 0), (gx*dx).sum()), ((0, dy, 0), (gy*dy).sum()):
        def value(s, changes=changes):
            moved = [t + s*h*change for t, change in zip((x, y, lr), changes)]
            return form(ce, *moved[:2], *weights, moved[2], drawn).item()
        assert (value(1) - value(-1))/(2*h) == pytest.approx(g.item()/3, rel=1e-4)

@pytest.mark.parametrize('form', FORMS)
def test_limits(form):
    ce, _, images, (start, target), lr = case()
    drawn = batches(3, 4)
    assert FORMS[form](ce, *images, start, target, lr, []) == 1 # no step
    assert FORMS[form](ce, *images, start, target, 0*lr, drawn) == 1 # steps of length 0

def test_in_float32():
    "whole runs are in float32, where the forms differ by rounding only"
    ce, net, *rest = case()
    net.float()
    single = [[t.detach().float() for t in part] for part in rest[:2]] + [rest[2].detach().float().requires_grad_()]
    for t in single[0]: t.requires_grad_()
    same(*(gradients(FORMS[name], ce, *single, batches(10, 6)) for name in ('rebuilt', 'plain')), 1e-3)

# The batches

def test_batches_depend_on_their_key_only():
    "passes over all images, the last batch of each the smaller one"
    a, b, c = (batches(5, 4, DSA, seed) for seed in (1, 1, 2))
    for (i, draw), (j, again) in zip(a, b):
        assert torch.equal(i, j) and draw.keys() == again.keys()
        assert all(torch.equal(draw[k], again[k]) for k in draw if torch.is_tensor(draw[k]))
    assert not all(torch.equal(i, j) for (i, _), (j, _) in zip(a, c))
    assert [len(i) for i, _ in a] == [4, 2, 4, 2, 4]
    for k in 0, 2: assert torch.cat([a[k][0], a[k + 1][0]]).sort()[0].tolist() == list(range(6))
    assert not torch.equal(a[0][0], a[2][0]) # shuffled anew

# The matcher

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])

def matcher(made, data=None, **kw):
    data = data or toys()
    def make(): return ConvNet(1, 3, 8, width=4)
    own = dict(experts=made, syn_lr=.05, max_start=1, expert_epochs=2, augment='')
    return TrajectoryMatcher(data, make, **own | kw)

@pytest.mark.parametrize('see', [lambda d: d, whitened])
def test_the_matcher_is_a_slow_unrolling(tmp_path, made, see):
    "of normalised or whitened images, from an expert's weights"
    data = see(toys())
    path = made if see is not whitened else make(data, tmp_path/'white', n=1).path
    ours = matcher(path, data, syn_steps=4)
    x, lr = torch.rand(6, 1, 8, 8, requires_grad=True), torch.tensor(.05, requires_grad=True)
    value = ours.loss(x, LABELS, lr, Key(0))
    pairs = [Experts(path).pair(k, 0, 2) for k in range(len(ours.experts))]
    onehot, drawn = F.one_hot(LABELS, 3).float(), [(torch.arange(6), {})]*4
    exact = partial(unroll, ours.student, Augment(''), False, None, data.normalize(x), onehot)
    slow = [exact(*pair, lr, drawn) for pair in pairs]
    expected = min(slow, key=lambda s: abs(s - value).item())
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    same(*(torch.autograd.grad(v, (x, lr)) for v in (value, expected)), 1e-3)

def test_experts_and_epochs_are_drawn_from_the_key(made, monkeypatch):
    ours, seen, pair = matcher(made, max_start=2, expert_epochs=1, syn_steps=1), [], Experts.pair
    monkeypatch.setattr(Experts, 'pair', lambda self, *at: seen.append(at) or pair(self, *at))
    x, lr = torch.rand(6, 1, 8, 8), torch.tensor(.1)
    values = [ours.loss(x, LABELS, lr, Key(0, 'matching', i)) for i in range(24)]
    assert set(seen) == {(k, t, 1) for k in range(3) for t in range(2)}
    assert ours.loss(x, LABELS, lr, Key(0, 'matching', 7)) == values[7]
    with seeded(3): a = ours.loss(x, LABELS, lr)
    with seeded(3): assert ours.loss(x, LABELS, lr, Key()) == a # without a key, torch's generator

def test_the_matcher_keeps_the_number_of_its_experts_only(made):
    ours = matcher(made)
    assert MATCHERS['trajectory'] is TrajectoryMatcher and not list(ours.parameters())
    assert ours.state_dict() == dict(_extra_state=dict(experts=3))
    assert (ours.whole, ours.needs_real, ours.separable) == (True, False, False)
    net = ours.start_net()
    assert torch.equal(to_vector(net), Experts(made)[0]['tau'][-1]) and net is not ours.start_net()

def test_experts_that_were_added_do_not_change_a_resumed_run(tmp_path):
    class Stop(Exception): pass
    class StopCB(LoopCB):
        order = 200
        def after_epoch(self): raise Stop('here')
    path, args = make(toys(), tmp_path/'experts', n=2).path, dict(ipc=1, width=4, outer=8, inner=1, log=None)
    args |= dict(experts=str(path), syn_steps=2, expert_epochs=1, max_start=2, report=2)
    whole = distill(toys(), 'mtt', **args)
    for name in 'more', 'fewer':
        with pytest.raises(Stop): distill(toys(), 'mtt', out=tmp_path/name, cbs=[StopCB()], **args)
    make(toys(), path, n=5)
    assert torch.equal(resume(tmp_path/'more', toys(), log=None).pixels, whole.pixels)
    for file in Experts(path).files[1:]: file.unlink()
    with pytest.raises(ValueError, match='holds 1 experts, and the run began with 2; restore them'):
        resume(tmp_path/'fewer', toys(), log=None)

@pytest.mark.parametrize('kw, says', [
    (dict(experts=None), 'experts=None: give a folder'), (dict(syn_lr=None), 'syn_lr=None'),
    (dict(syn_steps=0), 'syn_steps=0'), (dict(batch_syn=1.5), 'batch_syn=1.5'),
    (dict(form='fast'), "form='fast' must be one of"),
    (dict(max_start=0), 'max_start=0'), (dict(expert_epochs=0), 'expert_epochs=0'), (dict(lr_lr=-1.), 'lr_lr=-1.0'),
    (dict(max_start=3), 'max_start=3 and expert_epochs=2 reach epoch 4, but the experts have 3'),
    (dict(augment='sharpen'), 'sharpen'), (dict(experts='nowhere'), 'nowhere holds no experts'),
    (dict(data=toys(seed=4)), 'data digest=')])
def test_wrong_arguments(made, kw, says):
    with pytest.raises(ValueError, match=says): matcher(made, **kw)

def test_other_students_are_refused(made):
    def dropout(): return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))
    for form, says in dict(rebuilt='takes each step twice', plain='weights of another network').items():
        with pytest.raises(ValueError, match=says): TrajectoryMatcher(toys(), dropout, made, form=form, syn_lr=.1)

def test_no_expert_was_finished(tmp_path):
    make(toys(), tmp_path/'run', n=1).files[0].unlink()
    with pytest.raises(ValueError, match='no finished expert'): matcher(tmp_path/'run')

@pytest.mark.parametrize('see', [lambda d: d, whitened])
def test_a_run_in_pixels_is_a_run_in_the_reference_s_space(tmp_path, made, see):
    "steps of preconditioned pixels are steps of normalised or whitened ones"
    data, start = see(toys()), torch.rand(6, 1, 8, 8)
    ours = matcher(made if see is not whitened else make(data, tmp_path/'white').path, data, syn_steps=2)
    pixels = data.zca.inverse if see is whitened else lambda z: z*data.std + data.mean
    ends = []
    for inside in False, True: # optimise what `normalize` gives, or pixels
        x = (start.clone() if inside else data.normalize(start)).requires_grad_()
        lr = torch.tensor(.05, requires_grad=True)
        opt = torch.optim.SGD([dict(params=[x], lr=.5), dict(params=[lr], lr=1e-4)], momentum=.5)
        for i in range(3):
            opt.zero_grad()
            ours.loss(x if inside else pixels(x), LABELS, lr, Key(5, i)).backward()
            if inside: x.grad = precondition(data, x.grad)
            opt.step()
        ends.append((x.detach() if inside else pixels(x.detach()), lr.detach()))
    for a, b in zip(*ends): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert (ends[0][0] - start).abs().max() > .01

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

def test_experts_of_a_changed_network_are_refused(tmp_path, monkeypatch):
    class Scaled(torch.nn.Linear):
        scale = 1
        def forward(self, x): return self.scale*super().forward(x.flatten(1))
        def embed(self, x): return x.flatten(1)
        def logits(self, e): return self.scale*super().forward(e)
    data = load_data(toy_images(3, 6, 8))
    monkeypatch.setitem(ARCHS, 'mine', lambda classes: Scaled(64, classes))
    train = lambda: train_experts(data, tmp_path/'experts', 1, epochs=1, arch='mine', log=None)
    assert len(train()) == len(train()) == 1
    train().check(data)
    monkeypatch.setattr(Scaled, 'scale', 2)
    for again in train, lambda: Experts(tmp_path/'experts').check(data):
        with pytest.raises(ValueError, match='weights of another network.*or the code of this network has changed'):
            again()
