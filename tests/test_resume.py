"Runs that are killed, stopped, resumed and run side by side end with the same bits as a run that was left alone."
import csv
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image
from processes import Process, command
from torch import nn

from dreamplus.core import load_state, read_json, toy_images, write_json
from dreamplus.data.sources import load_data
from dreamplus.distilled import DistilledSet
from dreamplus.judge.evaluate import evaluate_run
from dreamplus.loop.distill import distill, resume
from dreamplus.loop.report import read_history
from dreamplus.machine import pick_device
from dreamplus.match.core import MATCHERS, Matcher
from dreamplus.match.experts import train_experts
from dreamplus.synthetic import decode

class Moving(Matcher):
    "A coupled matcher with a parameter that it trains itself, and a buffer that remembers"
    separable = False
    def __init__(self, pace: float = .1): # Learning rate of the parameter
        self.pace, self.scale = pace, nn.Parameter(torch.ones(()))
        self.register_buffer('seen', torch.zeros(()))

    def terms(self, real, syn):
        loss = (real.embed.mean(1) - syn.embed.mean(1)).pow(2).sum(1)
        own, = torch.autograd.grad(self.scale*loss.detach().mean(), self.scale)
        with torch.no_grad(): self.scale.add_(self.pace*own.sign()), self.seen.lerp_(loss.mean(), .5)
        return dict(moving=self.scale.detach()*loss/(1 + self.seen))

SMALL = dict(outer=2, inner=5, report=4, width=8, depth=1, n_data=16, net_batch=8, batch_real=4, lr=10., log=None)
RUNS = {
    'dream+': ('dream+', SMALL | dict(interval=2, warm_epochs=.5, per_class_steps=False)), # momentum of weight
    'some classes': ('dream', SMALL | dict(interval=2, candidates=6, class_batch=2)), # each with a choice of its own
    'idc': ('idc', SMALL | dict(factor=2, decode='multi', limit=3, start='noise', net_mix=.5, # draws of all kinds
                                optimiser='adam', lr=.05, label_lr=.1, ipc=[1, 2, 1])), # two moments, two groups
    'dsa': ('dsa', {k: v for k, v in SMALL.items() if k != 'n_data'} | dict(norm='batch', net_epochs=2)), # frozen norms
    'moving': ('idc', SMALL | dict(match='moving', class_batch=2))} # and passes of the random sampler

def die(): os.kill(os.getpid(), signal.SIGKILL)

# What runs in a process of its own. The checkpoint is written after each inner iteration, or every `seconds`

class DieCB(Callback):
    "Dies in `event` of inner iteration `at`; `order` says between which callbacks"
    def __init__(self, event, at, order): self.event, self.at, self.order = event, at, order
    def __call__(self, event):
        if event == self.event and self.dls.train.at == self.at: die()

def die_on_write(name, count, half):
    "Die at the `count`-th write of the file `name`: in the middle of it, or when it is just done"
    replace, seen = os.replace, []
    def patched(tmp, path):
        seen.append(Path(path).name)
        now = seen[-1] == name and seen.count(name) == count
        if now and half: os.truncate(tmp, os.path.getsize(tmp)//2), die()
        replace(tmp, path)
        if now: die()
    os.replace = patched

def toys(): return load_data(toy_images(classes=3))

def begin(out, run, cbs=(), seconds=0., dies=None, budget=()):
    MATCHERS['moving'] = Moving
    if dies: die_on_write(*dies)
    method, args = RUNS[run]
    distill(toys(), method, out=out, cbs=cbs, checkpoint_seconds=seconds, **args | dict(budget))

def go_on(out, run, dies=None):
    "As a user would: resume, or begin again where there is nothing to resume"
    if not (out/'run.json').exists(): return begin(out, run, dies=dies)
    MATCHERS['moving'] = Moving
    if dies: die_on_write(*dies)
    resume(out, toys(), log=None, checkpoint_seconds=0.)

# What is compared

def assert_killed(*processes):
    for p in processes: assert p.end() == (None, -signal.SIGKILL)

def assert_done(*processes):
    for p in processes: assert p.end() == (None, 0)

def tensors(out): return load_state(out/'distilled.safetensors')
def pixels(out): return tensors(out)['pixels']
def checkpoint(out): return load_state(out/'checkpoint'/'state.safetensors')
def history(out):
    with open(out/'history.csv', newline='') as f: return [(int(row['step']), row['loss']) for row in csv.DictReader(f)]

def files(out): return sorted(p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_file())
def leftovers(out): return [*out.rglob('.*.tmp')]

def assert_same(out, other):
    a, b = tensors(out), tensors(other)
    assert all(torch.equal(a[k], b[k]) for k in ('pixels', 'labels'))
    assert history(out) == history(other)
    assert files(out) == files(other) # and so no temporary ones

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Runs that nothing happened to"
    runs = {run: tmp_path_factory.mktemp('undisturbed')/'run' for run in RUNS}
    assert_done(*[Process(begin, out, run, (), 15) for run, out in runs.items()])
    return runs

def test_runs_are_worth_comparing(undisturbed):
    for out in undisturbed.values():
        assert (pixels(out) - load_state(out/'start.safetensors')['pixels']).abs().mean() > .01
        assert [step for step, _ in history(out)] == [4, 8, 10]
        assert not leftovers(out)
    assert (tensors(undisturbed['idc'])['labels'].max(1).values < 1).all()
    matcher = checkpoint(undisturbed['moving'])['matchers']['0']
    assert matcher['scale'] > 1 and matcher['seen'] > 0

def test_same_seed_twice_with_two_threads(tmp_path):
    for name in 'ab': assert_done(Process(begin, tmp_path/name, 'dream+', threads=2))
    assert_same(tmp_path/'a', tmp_path/'b')

def loaded(name): return name in sys.modules

def test_the_server_of_the_processes_has_its_modules(tmp_path, monkeypatch):
    "It says nothing if it lacks them, but then each process imports everything"
    monkeypatch.chdir(tmp_path)
    assert Process(loaded, 'tests.preloaded').end() == (True, 0)

# Killed

@pytest.mark.parametrize('event, at, order, seconds, runs', [
    ('before_fit', 0, 99, 0, 'idc'), # before the first checkpoint
    ('after_loss', 3, 0, 0, 'dream+'), ('after_batch', 4, -30, 0, 'dsa'), # between the parts of an iteration
    ('before_batch', 6, -15, 0, 'moving'), # the second network
    ('after_batch', 5, 99, 0, 'idc'), ('after_batch', 5, 101, 0, 'some classes'), # before and after a checkpoint
    ('after_epoch', 8, 75, 0, 'some classes'), ('after_epoch', 10, 101, 0, 'dream+'), # at a report, at the end
    ('after_batch', 7, 0, 15, 'dsa')]) # the last checkpoint is that of the report at 4
def test_killed_between(tmp_path, undisturbed, event, at, order, seconds, runs):
    runs, dies = runs.split(','), DieCB(event, at, order)
    assert_killed(*[Process(begin, tmp_path/run, run, [dies], seconds) for run in runs])
    for run in runs:
        assert (tmp_path/run/'checkpoint'/'state.safetensors').exists() == (event != 'before_fit')
        assert not (tmp_path/run/'distilled.safetensors').exists()
        if seconds: assert checkpoint(tmp_path/run)['at'] == 4
    assert_done(*[Process(go_on, tmp_path/run, run) for run in runs])
    for run in runs: assert_same(tmp_path/run, undisturbed[run])

@pytest.mark.parametrize('name, count, half', [
    ('run.json', 1, True), ('state.safetensors', 6, True), ('history.csv', 3, False),
    ('distilled.safetensors', 2, False), # after the description
    ('grid.png', 4, True)])
def test_killed_in_a_write(tmp_path, undisturbed, name, count, half):
    "in the middle of it, or when it is just done"
    out = tmp_path/'run'
    assert_killed(Process(begin, out, 'idc', (), 0, (name, count, half)))
    folder, = leftovers(out) # of the writer, which ended before it could remove it
    assert [p.name for p in folder.iterdir()] == [name]*half
    assert_done(Process(go_on, out, 'idc'))
    assert_same(out, undisturbed['idc'])

def test_killed_again_and_again(tmp_path, undisturbed):
    out, lives = tmp_path/'run', 0
    while (status := Process(go_on, out, 'idc', ('state.safetensors', 4, True)).end()[1]) == -signal.SIGKILL: lives += 1
    assert status == 0 and lives >= 3
    assert_same(out, undisturbed['idc'])

# Stopped, and side by side: what a shell sees

LONGER = ('distill --method dream+ --outer 2 --inner 15 --width 8 --nets 0 --set n_data=32 --set report=4 '
          '--set interval=10 --set batch_real=8 --set warm_epochs=0 --seed 3 --out').split()

def wait_for(path, alive):
    while not path.exists() and alive(): time.sleep(.005)

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp('alone')
    assert Process(command, folder, *LONGER, 'run').end()[0][0] == 0
    return folder/'run'

@pytest.fixture(scope='module')
def side_by_side(tmp_path_factory):
    "Runs at once; three get a signal when they have reported once: the folder, and name -> status, stderr"
    folder, signals = tmp_path_factory.mktemp('side by side'), ('SIGINT', 'SIGTERM', 'SIGKILL')
    left_alone, *others = (Process(command, folder, *LONGER, name) for name in ('left alone', *signals))
    for process, name in zip(others, signals):
        wait_for(folder/name/'history.csv', process.process.is_alive)
        os.kill(process.pid, getattr(signal, name))
    assert left_alone.end()[1] == 0
    *stopped, killed = others
    answers = [process.end() for process in stopped]
    assert_killed(killed)
    return folder, {name: answer[::2] if answer else (status, '') for name, (answer, status) in zip(signals, answers)}

def test_side_by_side(side_by_side, alone):
    assert_same(side_by_side[0]/'left alone', alone)

@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_stopped(side_by_side, name):
    folder, ended = side_by_side
    status, err = ended[name]
    assert status == 130
    assert err.count('\n') == 2 and 'dreamplus resume' in err # after a line of progress
    assert 4 <= checkpoint(folder/name)['at'] < 30
    assert not (folder/name/'distilled.json').exists() and not leftovers(folder/name)

@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGKILL'])
def test_stopped_and_resumed(side_by_side, alone, name):
    assert Process(command, side_by_side[0], 'resume', name, '--nets', 0).end()[0][0] == 0
    assert_same(side_by_side[0]/name, alone)

class StopCB(Callback):
    "Ctrl-C during inner iteration `at`"
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.dls.train.at == self.at: os.kill(os.getpid(), signal.SIGINT)

def stopped(out, run, at, budget=()):
    try: begin(out, run, [StopCB(at)], 15, None, budget)
    except KeyboardInterrupt: return checkpoint(out)['at']

@pytest.mark.parametrize('run, at', [('idc', 4), ('moving', 5)]) # 4 reports
def test_stopped_at(tmp_path, undisturbed, run, at):
    assert Process(stopped, tmp_path/'run', run, at).end() == (at, 0)
    assert not (tmp_path/'run'/'distilled.json').exists()
    assert_done(Process(go_on, tmp_path/'run', run))
    assert_same(tmp_path/'run', undisturbed[run])

# Budgets

def test_minutes(tmp_path):
    "A resumed run spends what is left of its minutes, and its pixels are those of as many inner iterations at once"
    out, whole, budget = tmp_path/'run', tmp_path/'whole', 1.
    assert Process(stopped, out, 'idc', 3, dict(outer=None, report=None, minutes=budget/60)).end() == (3, 0)
    spent = checkpoint(out)['callbacks']['clock_cb']['seconds']
    began = time.monotonic()
    assert_done(Process(go_on, out, 'idc'))
    made = read_json(out/'distilled.json')['provenance']
    assert spent < budget <= made['seconds'] and made['seconds'] - spent <= time.monotonic() - began
    assert made['steps'] == read_history(out)[-1]['step'] > 3
    assert_done(Process(go_on, out, 'idc')) # nothing is left to spend
    assert read_json(out/'distilled.json')['provenance']['steps'] == made['steps']
    assert_done(Process(begin, whole, 'idc', (), 15, None, dict(outer=made['steps'], steps=made['steps'])))
    assert torch.equal(pixels(out), pixels(whole))

def test_steps(tmp_path, undisturbed):
    "A budget that ends a run early, also one that was stopped before"
    out = tmp_path/'run'
    assert Process(stopped, out, 'dream+', 2, dict(steps=4)).end() == (2, 0)
    assert_done(Process(go_on, out, 'dream+'))
    assert history(out) == history(undisturbed['dream+'])[:1]

# What may be resumed

def refused(out, *says, data=None):
    before = {name: (out/name).read_bytes() for name in files(out)}
    with pytest.raises(ValueError) as error: resume(out, data, log=None)
    assert not [part for part in says if part not in str(error.value)], str(error.value)
    assert {name: (out/name).read_bytes() for name in files(out)} == before

def test_other_data_is_refused(undisturbed):
    out = undisturbed['idc']
    refused(out, 'pass the same data')
    refused(out, 'digests differ', data=load_data(toy_images(classes=3, seed=1)))
    refused(out, 'digests differ', data=load_data(toy_images(classes=3), seed=1))

def of_digits(out, dies=()):
    distill(load_data().hold_out(.2), 'idc', out=out, cbs=dies, checkpoint_seconds=0., **SMALL)

def go_on_alone(out): resume(out, log=None) # with the data that it was distilled from

def test_data_that_can_be_loaded_again(tmp_path):
    "are what the run had, the validation split that was held out included; others are refused"
    out, whole = tmp_path/'run', tmp_path/'whole'
    assert_killed(Process(of_digits, out, [DieCB('after_batch', 3, 0)]))
    refused(out, 'hold out the same part', data=load_data().hold_out(.3))
    refused(out, 'hold out the same part', data=load_data().hold_out(.2, seed=1))
    info = read_json(out/'run.json')
    changed = info | dict(data=info['data'] | dict(origin=info['data']['origin'] | dict(seed=1)))
    write_json(out/'run.json', changed)
    refused(out, 'digests differ')
    write_json(out/'run.json', info)
    assert_done(Process(of_digits, whole), Process(go_on_alone, out))
    assert_same(out, whole)

# Elsewhere, for longer, and from earlier sets

FEW = dict(inner=2, report=2, width=8, depth=1, n_data=16, net_batch=8, batch_real=4, log=None)

def images(folder, seed=0):
    "A folder of 3 classes of images"
    x, y = toy_images(classes=3, per_class=6, seed=seed)
    for i, (image, c) in enumerate(zip(x, y.tolist())):
        (folder/f'class{c}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder/f'class{c}'/f'{i:02}.png')
    return folder

@pytest.fixture
def moved(tmp_path, monkeypatch):
    "A run, and its data, that were copied together to another place; the run had a GPU and 99 threads"
    data = load_data(images(tmp_path/'a'/'data'))
    distill(data, 'idc', outer=2, out=tmp_path/'a'/'runs'/'first', **FEW)
    shutil.copytree(tmp_path/'a', tmp_path/'b')
    shutil.rmtree(tmp_path/'a')
    monkeypatch.chdir(tmp_path)
    out = tmp_path/'b'/'runs'/'first'
    write_json(out/'run.json', read_json(out/'run.json') | dict(device='cuda:7', threads=99))
    return out

def test_a_run_goes_on_elsewhere_and_says_so(moved):
    said = []
    more = resume(moved, outer=3, log=said.append)
    info = read_json(moved/'run.json')
    assert 'device: cuda:7 then' in said[0] and f'threads: 99 then, {torch.get_num_threads()} now' in said[0]
    assert info['device'] == str(pick_device()) and info['changed'][0]['step'] == 4
    assert more.provenance['steps'] == 6 and more.provenance['changed'] == info['changed']
    said.clear()
    resume(moved, log=said.append)
    assert not [line for line in said if 'then' in line] # nothing has changed since

@pytest.mark.parametrize('where', ['data', 'root', 'here', 'itself'])
def test_data_that_moved_alone(moved, tmp_path, monkeypatch, where):
    "are named, or found by their name here; other data are refused"
    (tmp_path/'b'/'data').rename(tmp_path/'data' if where == 'here' else tmp_path/'elsewhere')
    if where == 'root': (tmp_path/'root').mkdir(), (tmp_path/'elsewhere').rename(tmp_path/'root'/'data')
    if where == 'itself': refused(moved, 'data in', 'does not exist here', '--data FOLDER', '--root')
    given = dict(data=dict(data='elsewhere'), root=dict(root='root'), itself=dict(root='elsewhere'), here={})[where]
    before = pixels(moved)
    assert torch.equal(resume(moved, log=None, **given).pixels, before)
    with pytest.raises(ValueError, match='digests differ'): resume(moved, images(tmp_path/'other', seed=1), log=None)

@pytest.mark.parametrize('more, says', [(dict(outer=1), 'outer=1 is below the 2 outer iterations'),
                                        (dict(outer=0), 'outer=0 must be'), (dict(device='nope'), 'not a device'),
                                        (dict(lr=1.), "'lr' cannot change"), (dict(root='nowhere'), 'is not a folder')])
def test_going_on_refused(moved, more, says):
    before = {name: (moved/name).read_bytes() for name in files(moved)}
    with pytest.raises(ValueError, match=says): resume(moved, log=None, **more)
    assert {name: (moved/name).read_bytes() for name in files(moved)} == before

@pytest.mark.parametrize('run', ['dream+', 'moving']) # which has state of all kinds
def test_more_iterations_are_those_of_a_longer_run(tmp_path, monkeypatch, run):
    monkeypatch.setitem(MATCHERS, 'moving', Moving)
    method, args = RUNS[run]
    args = args | dict(inner=2, report=2)
    distill(toys(), method, out=tmp_path/'run', steps=3, **args | dict(outer=2)) # a budget, which `outer` replaces
    more = resume(tmp_path/'run', toys(), outer=4, log=None)
    whole = distill(toys(), method, **args | dict(outer=4))
    assert torch.equal(more.pixels, whole.pixels) and more.provenance['steps'] == 8
    assert read_json(tmp_path/'run'/'run.json')['args']['outer'] == 4
    assert torch.equal(resume(tmp_path/'run', toys(), log=None).pixels, whole.pixels) # killed after: the new goal

def test_a_budget_that_outer_replaces_raises_the_learning_rate(tmp_path):
    "also where outer is that of the recipe, and the run says so"
    said, args = [], FEW | dict(outer=4, lr_schedule='cosine')
    distill(toys(), 'idc', out=tmp_path/'run', steps=2, **args)
    resume(tmp_path/'run', toys(), log=said.append)
    assert not any('lr_schedule' in line for line in said)
    resume(tmp_path/'run', toys(), outer=4, log=said.append)
    assert any('so the learning rate rises now' in line for line in said)

def test_a_result_of_fewer_iterations_is_not_reused(tmp_path):
    data = load_data()
    distill(data, 'idc', out=tmp_path/'run', **FEW | dict(outer=1, lr=10.))
    table = dict(n=1, rows=('distilled',), epochs=0, steps=1)
    first = evaluate_run(tmp_path/'run', data, **table)
    assert evaluate_run(tmp_path/'run', data, **table) == first
    resume(tmp_path/'run', data, outer=2, log=None)
    with pytest.warns(UserWarning, match='tested before'): again = evaluate_run(tmp_path/'run', data, **table)
    assert again['test_uses'] == 2 and again['images'] != first['images']

def test_relative_folders_work_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_experts(load_data(), 'ex', 1, epochs=2, width=4, log=None)
    own = dict(width=4, outer=2, syn_steps=2, max_start=1, expert_epochs=1, log=None)
    made = distill(load_data(), 'mtt', experts='ex', out='run', **own)
    (tmp_path/'x').mkdir(), monkeypatch.chdir(tmp_path/'x')
    assert torch.equal(resume('../run', log=None).pixels, made.pixels)
    (tmp_path/'ex').rename(tmp_path/'x'/'moved')
    with pytest.raises(ValueError, match='holds no experts'): resume('../run', log=None)
    assert torch.equal(resume('../run', log=None, experts='moved').pixels, made.pixels)

STILL = FEW | dict(outer=1, lr=0., start='random') # the pixels stay as they begin

def start_of(start, ipc=1, factor=1, **more):
    return distill(toys(), 'idc', ipc, factor, **STILL | more | dict(start=start))

def test_a_start_from_a_run_a_set_or_pixels(tmp_path):
    "with fewer or more images, where the recipe's start adds what is missing"
    first = distill(toys(), 'idc', 2, 1, out=tmp_path/'run', **STILL)
    x = first.pixels.unflatten(0, (3, 2))
    for start in tmp_path/'run', str(tmp_path/'run'), first, x, x.flatten(0, 1).numpy(), (255*x).round().byte():
        assert torch.allclose(start_of(start, 2).pixels, first.pixels, atol=.5/255)
    assert torch.equal(start_of(first).pixels, x[:, 0])
    more = start_of(first, [2, 3, 4])
    assert more.counts == [2, 3, 4] and torch.equal(more.pixels[[0, 1, 2, 3, 5, 6]], first.pixels)
    own = load_state(tmp_path/'run'/'start.safetensors')['pixels']
    assert torch.equal(own, first.pixels) and (more.pixels[7:].std((1, 2, 3)) > .05).all() # real images
    assert more.provenance['earlier'] == 'pixels of the caller'

def test_a_start_of_another_factor_or_order():
    x, names = torch.rand(3, 1, 1, 8, 8), ['0', '1', '2']
    four = DistilledSet(x, names, [.5], [.2], factor=2)
    assert torch.equal(start_of(four, 3).pixels.unflatten(0, (3, 3)), decode(x, 2)[:, :3])
    assert torch.equal(start_of(DistilledSet(x[[2, 0, 1]], ['2', '0', '1'], [.5], [.2])).pixels, x[:, 0])

def test_a_start_that_is_decoded_in_another_way():
    "is decoded and stored anew; at factor 1, nothing is decoded"
    x, names = torch.rand(3, 1, 1, 8, 8)*.2 + .4, ['0', '1', '2']
    blurred = DistilledSet(x, names, [.5], [.2], factor=2)
    new = start_of(blurred, factor=2, decode='sharp')
    assert new.decode == 'sharp' and not torch.equal(new.pixels, x[:, 0])
    torch.testing.assert_close(new.images(), blurred.images(), atol=.02, rtol=0)
    two = replace(blurred, pixels=torch.cat([x, 1 - x], 1).flatten(0, 1), y=torch.arange(3).repeat_interleave(2))
    assert torch.equal(start_of(two, 2, 2, decode='sharp').pixels[::2], new.pixels) # images keep their places
    assert torch.equal(start_of(two, 1, 2, decode='sharp').pixels, new.pixels)
    for same in replace(blurred, decode='multi'), x: assert torch.equal(start_of(same, factor=2).pixels, x[:, 0])
    assert torch.equal(start_of(x, factor=2, decode='sharp').pixels, x[:, 0]) # pixels are as the run stores them
    one = replace(blurred, factor=1, decode='bicubic')
    assert torch.equal(start_of(one, factor=1).pixels, x[:, 0])

@pytest.mark.parametrize('factor, says', [(1, 'has no image of class .1.; use another set'),
                                          (2, 'has too few images of class .0. for one image at factor=2; ')])
def test_a_start_with_an_empty_class(factor, says):
    dset = DistilledSet(torch.rand(2, 1, 8, 8), ['0', '1', '2'], [.5], [.2], y=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=f'start: the earlier set {says}'): start_of(dset, factor=factor)

def test_soft_labels_of_a_start():
    soft = DistilledSet(torch.rand(3, 1, 8, 8), ['0', '1', '2'], [.5], [.2], y=torch.eye(3)*.4 + .2)
    torch.testing.assert_close(start_of(soft, 2, label_lr=0.).y[::2], soft.y)
    with pytest.warns(UserWarning, match='soft labels of the earlier set are not used'): start_of(soft)

def test_pixels_out_of_range():
    with pytest.warns(UserWarning, match='lie outside of .* are clamped'): start_of(torch.randn(3, 1, 1, 8, 8))

@pytest.mark.parametrize('start, says', [
    (torch.rand(2, 1, 1, 8, 8), 'give pixels .* of 3 classes'), (255*torch.rand(3, 1, 1, 8, 8), 'floats in'),
    (torch.rand(3, 1, 1, 9, 9), 'the same size and channels'), (torch.full((3, 1, 1, 8, 8), torch.nan), 'not finite'),
    ('runs/none', 'is not a folder'), ('noize', "did you mean 'noise'"),
    (DistilledSet(torch.rand(3, 1, 8, 8), ['a', 'b', 'c'], [.5], [.2], y=torch.arange(3)), "but not '0' of")], ids=str)
def test_starts_refused(tmp_path, start, says):
    with pytest.raises(ValueError, match=says): start_of(start, out=tmp_path/'run')
    assert not (tmp_path/'run').exists()

def test_a_start_is_kept_for_a_run_that_is_killed(tmp_path):
    "before its first checkpoint; what it started from is gone"
    first, out = distill(toys(), 'idc', out=tmp_path/'first', **STILL), tmp_path/'run'
    x = 1 - first.pixels
    distill(toys(), 'idc', out=out, **STILL | dict(start=x.unflatten(0, (3, 1))))
    shutil.rmtree(out/'checkpoint'), (out/'distilled.json').unlink()
    assert torch.equal(resume(out, toys(), log=None).pixels, x)
    assert read_json(out/'run.json')['earlier'] == 'pixels of the caller'
