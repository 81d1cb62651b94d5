"Nothing leaks from future classes; a killed experiment continues; networks learn as in papers; bad input is one line."
import os
import re
import signal

import pytest
import torch
from processes import Process
from torch.nn import functional as F

from dreamplus.apps import continual as module
from dreamplus.apps.continual import Chain, Course, continual, continual_table, load_continual, plot_continual
from dreamplus.apps.memory import class_steps
from dreamplus.cli import main
from dreamplus.core import load_state, read_json, toy_images
from dreamplus.data.core import to_float
from dreamplus.data.sources import load_data
from dreamplus.distilled import load_distilled
from dreamplus.judge.evaluate import score
from dreamplus.judge.protocols import train_fresh
from dreamplus.loop.report import BudgetCB

SMALL = dict(steps=2, orders=1, nets=1, iterations=3, training=dict(epochs=0, steps=3), width=4, log=None)
FEW = dict(batch_real=4)
BANK = dict(bank_nets=1, bank_stages='2,4', stat_images=8, start_candidates=8)

@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    "As many threads as the process that is killed has: another number changes the last bits"
    monkeypatch.setitem(module.CHOOSER, 'steps', 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def toys(change=None):
    "Four classes; `change` alters the images of train and test"
    parts = [toy_images(classes=4, per_class=10, seed=seed) for seed in (0, 1)]
    if change: parts = [(change(x, y), y) for x, y in parts]
    return load_data(parts[0], test=parts[1])

def bare(records): return [{k: v for k, v in r.items() if k not in ('seconds', 'command')} for r in records]
def sets(out):
    return {p.parent.relative_to(out).as_posix(): load_state(p) for p in sorted(out.glob('*/*/distilled.safetensors'))}

# No leak

@pytest.mark.parametrize('method, own', [('best', BANK | dict(zca=True)), ('herding', {}), ('finetune', FEW)])
def test_images_of_future_classes_change_nothing(tmp_path, method, own):
    "bit for bit: not the sets, normalisation, whitening and bank of the first step, nor the network after it"
    future = torch.tensor(class_steps(4, 2)[1])
    def other(x, y):
        mask = torch.isin(y, future)
        return torch.where(mask[:, None, None, None], x[torch.randperm(len(x))].flip(-1)//2, x)
    protocol = dict(protocol='finetune-kd') if method == 'finetune' else {}
    name = 'dm' if method == 'finetune' else method
    for folder, data in dict(a=toys(), b=toys(other)).items():
        continual(data, [name], ipc=(2,), out=tmp_path/folder, **SMALL | own | protocol)
    (a,), (b,) = (load_continual(tmp_path/folder) for folder in 'ab')
    assert a['data'] != b['data'] and a['by_step'][0] == b['by_step'][0]
    one, two = sets(tmp_path/'a'), sets(tmp_path/'b')
    first, second = f'order0-step0/{name}-ipc2-seed0', f'order0-step1/{name}-ipc2-seed0'
    if name != 'herding':
        assert torch.equal(one[first]['pixels'], two[first]['pixels'])
        assert not torch.equal(one[second]['pixels'], two[second]['pixels'])
        made = [load_distilled(tmp_path/folder/first) for folder in 'ab']
        assert (made[0].mean, made[0].std) == (made[1].mean, made[1].std)
    courses = [Course(data, tmp_path, dict(steps=2, protocol='quick', training={}, iterations=1, minutes=None,
                                           experts={}, overrides={})) for data in (toys(), toys(other))]
    assert courses[0].seen(0, 0).digest == courses[1].seen(0, 0).digest
    if name == 'herding':
        x, y = (course.new_set(Chain('herding', 2, None, 0, 0), 0)[0].pixels for course in courses)
        assert torch.equal(x, y)

# Killed

def killed(out, at):
    "Dies in an inner iteration of the second step, with a checkpoint after each"
    after = BudgetCB.after_batch
    def dies(self):
        here = self.learn.path.parent.name, self.dls.train.at
        if here == ('order0-step1', at): os.kill(os.getpid(), signal.SIGKILL)
        after(self)
    BudgetCB.after_batch = dies
    continual(toys(), ['dm', 'random'], ipc=(2,), out=out, checkpoint_seconds=0., **SMALL | FEW)

def test_killed_experiment_ends_with_the_same_bits(tmp_path, monkeypatch):
    assert Process(killed, tmp_path/'a', 2).end() == (None, -signal.SIGKILL)
    assert [*sets(tmp_path/'a')] == ['order0-step0/dm-ipc2-seed0'] and not load_continual(tmp_path/'a')
    with open(tmp_path/'a'/'records.jsonl', 'a') as f: f.write('{"method": "dm", "ip') # killed again, while it writes
    resumed, whole = (continual(toys(), ['dm', 'random'], ipc=(2,), out=tmp_path/name, **SMALL | FEW) for name in 'ab')
    assert bare(resumed) == bare(whole)
    one, two = sets(tmp_path/'a'), sets(tmp_path/'b')
    assert one.keys() == two.keys() and all(torch.equal(one[k]['pixels'], two[k]['pixels']) for k in one)
    for name in 'distilled', 'chain': monkeypatch.delattr(module.Course, name)
    assert continual(toys(), ['dm', 'random'], ipc=(2,), out=tmp_path/'a', **SMALL | FEW) == resumed
    with pytest.raises(ValueError, match='was made with another iterations'):
        continual(toys(), ['dm'], ipc=(2,), out=tmp_path/'a', **SMALL | FEW | dict(iterations=4))

def test_a_failure_is_a_line_and_is_tried_again(tmp_path, monkeypatch):
    chain = Course.chain
    def fails(self, c): raise ValueError('not today')
    monkeypatch.setattr(Course, 'chain', fails)
    failed, = continual(toys(), ['random'], ipc=(1,), out=tmp_path/'out', **SMALL)
    assert 'failed: random, order 0, network 0: not today' in continual_table(tmp_path/'out')
    monkeypatch.setattr(Course, 'chain', chain)
    continual(toys(), ['random'], ipc=(1,), out=tmp_path/'out', **SMALL)
    assert ['failed' in r for r in load_continual(tmp_path/'out')] == [False]

# Memories

def test_one_step_is_an_ordinary_evaluation(tmp_path):
    "of a set of all classes: same network, same bits"
    data, own = toys(), SMALL | FEW | dict(steps=1)
    r, = continual(data, ['dm'], ipc=(1,), out=tmp_path/'out', **own)
    course = Course(data, tmp_path, dict(steps=1, protocol='quick', training=SMALL['training'], iterations=3,
                                         minutes=None, experts={}, overrides=FEW | dict(width=4)))
    dset = load_distilled(tmp_path/'out'/'order0-step0'/'dm-ipc1-seed0')
    dset.evaluation = course.learner
    row, = score(dset, course.seen(0, 0), n=1, rows=('distilled',), epochs=0, steps=3, batch=16)
    assert row['accs'] == r['accs'] and r['by_step'] == [r['accs']] and r['bytes'] == [4*4*64]

def test_a_fixed_total_is_shared_by_the_classes_seen(tmp_path):
    course = Course(toys(), tmp_path, dict(steps=2, protocol='quick', training={}, iterations=2, minutes=None,
                                           experts={}, overrides=FEW | dict(width=4)))
    for method in 'dm', 'random':
        (first,), (kept, new) = (sets for sets, _ in course.sets(Chain(method, None, 8, 0, 0)))
        assert first.counts == [4, 4] and kept.counts == new.counts == [2, 2]
        assert torch.equal(kept.pixels, first.pixels[[0, 1, 4, 5]])

def test_joint_and_full(tmp_path):
    records = continual(toys(), ['dm', 'joint', 'full'], ipc=(1,), out=tmp_path/'out', **SMALL | FEW)
    assert [r['method'] for r in records] == ['dm', 'dm-joint', 'full']
    assert [r['images'] for r in records] == [[2, 4], [2, 4], [20, 40]]
    continual(toys(), ['random'], ipc=(1,), out=tmp_path/'out', **SMALL | FEW) # batch_real is an argument of dm
    whole, order = load_distilled(tmp_path/'out'/'joint'/'dm-ipc1-seed0'), sum(class_steps(4, 2), [])
    course = Course(toys(), tmp_path/'out', records[0] | dict(steps=2, protocol='quick', training={}))
    *_, (joint, _) = course.sets(Chain('dm-joint', 1, None, 0, 0))
    assert torch.equal(torch.cat([s.pixels for s in joint]), whole.pixels[order])
    table = continual_table(records)
    assert len({len(re.split(r'(?<!\\)\|', line)) for line in table.split('\n') if line.startswith('|')}) == 1
    assert [len(ax.lines) for ax in plot_continual(records).axes] == [3]

# Protocols

def test_a_continued_network_is_taught_by_the_one_before(monkeypatch):
    "and begins as this one, with new rows in its head; the slow loss loops over images and classes"
    from dreamplus.apps import memory
    data, e = toys(), dict(arch='convnet', width=4, norm='instance')
    p, T = memory.continual_args('finetune-kd', e | dict(augment='', mix=0.), epochs=0, steps=1, lr=.1)
    two = memory.alone(data, [0, 1])
    before = train_fresh(two.train.x, two.train.y, two, e, p)
    monkeypatch.setattr(memory, 'train_network', lambda net, x, y, data, p, **kw: (net, kw))
    net, how = memory.learn(data.train.x, data.train.y, data, e, p, 5, before, T)
    assert torch.equal(net.classifier.weight[:2], before.classifier.weight)
    assert all(torch.equal(a, b) for a, b in zip(net.blocks.parameters(), before.blocks.parameters()))
    x, y = data.normalize(to_float(data.train.x[::8])), data.train.y[::8]
    s, t, slow = (net(x)[:, :2]/T).log_softmax(1), (before(x)/T).softmax(1), 0.
    for i in range(len(x)):
        for c in range(2): slow += (t[i, c]*(t[i, c].log() - s[i, c])).item()/(2*len(x)) # the mean over both
    expected = F.cross_entropy(net(x), y).item() + slow*T**2*2
    before.zero_grad()
    loss = how['loss'](how['call'](x), y)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(q.grad is None for q in before.parameters())

# Bad input

@pytest.mark.parametrize('given, says', [
    ('--steps 11', 'steps=11 must be from 1 to 10'), ('--methods dmm', "method 'dmm' is unknown"),
    ('--ipc 0', 'ipc=0 must be at least 1'), ('--memory 9', 'memory=9 must be at least 10'),
    ('--ipc 2000', "ipc=2000 needs 2000 images of a class"), ('--orders 0', 'orders=0 must be at least 1'),
    ('--protocol paper', "'paper'"), ('--training epoch=1', "'epoch' is not an argument"),
    ('--training soft=kl', "soft='kl' has no effect"), ('--set warmth=1', "'warmth' is not an argument"),
    ('--methods random --set warmth=1', "'warmth' is not an argument"),
    ('--iterations 0', 'iterations=0 must be above 0'), ('--iterations 1 --minutes 1', 'give one of them'),
    ('--methods mtt --set experts=there', 'experts'), ('--ipc x', "'x' is not a list")])
def test_refused_before_any_work(tmp_path, monkeypatch, capsys, given, says):
    monkeypatch.chdir(tmp_path)
    status = main(['continual', '--ipc', '1', '--methods', 'dm', *given.split()])
    err = capsys.readouterr().err
    assert status == 2 and err.startswith('dreamplus: error: ') and err.count('\n') == 1 and says in err, err
    assert not [*tmp_path.iterdir()]

def test_a_memory_needs_one_factor():
    "of its sets: refused before any of them is distilled"
    data = load_data(toy_images(classes=4, per_class=40, size=32), test=toy_images(classes=4, size=32, seed=1))
    args = dict(methods=('best',), steps=2, memory=(4,), out='never', orders=1, nets=1, iterations=1, log=None)
    with pytest.raises(ValueError, match='best has factor 2 for 2, 4 for 1 images of a class, .* factor=2'):
        continual(data, **args)
    assert not os.path.exists('never')

def test_a_recipe_may_have_another_length_where_there_is_no_budget(tmp_path):
    how = dict(ipc=(1,), **SMALL | dict(iterations=None), outer=2, **FEW)
    continual(toys(), ['dm'], out=tmp_path/'a', **how)
    assert read_json(next((tmp_path/'a').glob('order0-step0/*/run.json')))['args']['outer'] == 2
    with pytest.raises(ValueError, match='outer=2 has no effect: the budget sets the length'):
        continual(toys(), ['dm'], out=tmp_path/'b', **how | dict(iterations=3))
