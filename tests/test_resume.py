"Runs that are killed, stopped, resumed and run side by side end with the same bits as a run that was left alone."
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from processes import Process, command

from dreamplus.loop.callbacks import CheckpointCB
from dreamplus.core import load_state, read_json, toy_images, write_json
from dreamplus.loop.distill import distill, resume
from dreamplus.data.sources import load_data

CONSOLE = sys.executable, '-c', 'import sys; from dreamplus.cli import main; sys.exit(main())'
SMALL = dict(outer=2, inner=5, report=4, width=8, n_data=16, net_batch=8, batch_real=4, lr=10., log=None)
METHODS = {
    'dream+': SMALL | dict(interval=2, warm_epochs=.5, per_class_steps=False), # momentum of weight
    'dream': SMALL | dict(interval=2, candidates=6),
    'idc': SMALL | dict(factor=2, decode='multi', limit=3, start='noise', net_mix=.5), # draws of all kinds
    'dsa': {k: v for k, v in SMALL.items() if k != 'n_data'} | dict(norm='batch', net_epochs=2)} # frozen batch norms

def die(): os.kill(os.getpid(), signal.SIGKILL)

# What runs in a process of its own. The checkpoint is written after each update, or every `seconds`

class DieCB(Callback):
    "Dies in `event` of inner iteration `at`; `order` says between which callbacks"
    def __init__(self, event, at, order): self.event, self.at, self.order = event, at, order
    def __call__(self, event):
        if event == self.event and self.dls.at == self.at: die()

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

def toys(): return load_data(toy_images(classes=2))

def begin(out, method, cbs=(), seconds=0., dies=None):
    CheckpointCB.__init__.__defaults__ = seconds,
    if dies: die_on_write(*dies)
    distill(toys(), method, out=out, cbs=cbs, **METHODS[method])

def go_on(out, method, dies=None):
    "As a user would: resume, or begin again where there is nothing to resume"
    if not (out/'run.json').exists(): return begin(out, method, dies=dies)
    CheckpointCB.__init__.__defaults__ = 0.,
    if dies: die_on_write(*dies)
    resume(out, toys(), log=None)

# What is compared

def assert_killed(*processes):
    for p in processes: assert p.end() == (None, -signal.SIGKILL)

def assert_done(*processes):
    for p in processes: assert p.end() == (None, 0)

def pixels(out): return load_state(out/'distilled.safetensors')['pixels']
def history(out):
    with open(out/'history.csv', newline='') as f: return [(int(row['step']), row['loss']) for row in csv.DictReader(f)]

def files(out): return sorted(p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_file())
def leftovers(out): return [*out.rglob('.*.tmp')]

def assert_same(out, other):
    assert torch.equal(pixels(out), pixels(other))
    assert history(out) == history(other)
    assert files(out) == files(other) # and so no temporary ones

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "A run of each method that nothing happened to"
    runs = {method: tmp_path_factory.mktemp('undisturbed')/'run' for method in METHODS}
    assert_done(*[Process(begin, out, method, (), 15) for method, out in runs.items()])
    return runs

def test_runs_are_worth_comparing(undisturbed):
    for method, out in undisturbed.items():
        start = Process(start_of, method).end()[0]
        assert (pixels(out) - torch.from_numpy(start)).abs().mean() > .01
        assert [step for step, _ in history(out)] == [4, 8, 10]
        assert not leftovers(out)

def start_of(method):
    "The pixels before the first update"
    return distill(toys(), method, **METHODS[method] | dict(outer=1, inner=1, lr=0.)).pixels.numpy()

def test_same_seed_twice(tmp_path, undisturbed):
    assert_done(*[Process(begin, tmp_path/method, method) for method in METHODS]) # with a checkpoint after each update
    for method, out in undisturbed.items(): assert_same(tmp_path/method, out)

def test_same_seed_twice_with_two_threads(tmp_path):
    for name in 'ab': assert_done(Process(begin, tmp_path/name, 'dream+', threads=2))
    assert_same(tmp_path/'a', tmp_path/'b')

# Killed

@pytest.mark.parametrize('event, at, order, seconds', [
    ('before_fit', 0, 99, 0), # before the first checkpoint
    ('before_batch', 1, -99, 0), ('after_loss', 3, 0, 0), ('after_batch', 4, -30, 0), # between its parts
    ('after_batch', 5, 99, 0), ('after_batch', 5, 101, 0), # just before and after a checkpoint
    ('before_batch', 6, -15, 0), # with the second network
    ('after_batch', 8, 101, 0), ('after_epoch', 8, 75, 0), ('after_epoch', 8, 101, 0), # at a report
    ('after_batch', 10, 101, 0), ('after_fit', 10, 0, 0), ('after_batch', 7, 0, 15)]) # no checkpoint but the first
def test_killed_between(tmp_path, undisturbed, event, at, order, seconds):
    dies = DieCB(event, at, order)
    assert_killed(*[Process(begin, tmp_path/method, method, [dies], seconds) for method in METHODS])
    for method in METHODS:
        assert (tmp_path/method/'checkpoint'/'state.safetensors').exists() == (event != 'before_fit')
        assert not (tmp_path/method/'distilled.safetensors').exists()
    assert_done(*[Process(go_on, tmp_path/method, method) for method in METHODS])
    for method in METHODS: assert_same(tmp_path/method, undisturbed[method])

@pytest.mark.parametrize('name, count', [
    ('run.json', 1), ('state.safetensors', 1), ('state.safetensors', 6), ('history.csv', 2), ('grid.png', 2),
    ('state.safetensors', 11), ('distilled.safetensors', 1), ('distilled.json', 1), ('grid.png', 4)])
def test_killed_in_a_write(tmp_path, undisturbed, name, count):
    half, whole = tmp_path/'half', tmp_path/'whole'
    assert_killed(*[Process(begin, out, 'dream+', (), 0, (name, count, out == half)) for out in (half, whole)])
    assert len(leftovers(half)) == 1 and not leftovers(whole)
    assert_done(*[Process(go_on, out, 'dream+') for out in (half, whole)])
    for out in (half, whole): assert_same(out, undisturbed['dream+'])

def test_killed_again_and_again(tmp_path, undisturbed):
    out, lives = tmp_path/'run', 0
    while (status := Process(go_on, out, 'idc', ('state.safetensors', 3, True)).end()[1]) == -signal.SIGKILL: lives += 1
    assert status == 0 and lives >= 5
    assert_same(out, undisturbed['idc'])

# Stopped, and side by side: what a shell sees

LONGER = ('distill --outer 2 --inner 25 --width 8 --nets 0 --set n_data=64 --set report=7 --set interval=10 '
          '--set batch_real=8 --seed 3 --out').split()

def wait_for(path, alive):
    while not path.exists() and alive(): time.sleep(.005)

@pytest.fixture(scope='module')
def side_by_side(tmp_path_factory):
    "Runs at once, two of which are told to stop when they have reported once: the folder, and name -> status, stderr"
    folder = tmp_path_factory.mktemp('side by side')
    console = subprocess.Popen([*CONSOLE, *LONGER, 'SIGINT'], cwd=folder, env=os.environ | dict(OMP_NUM_THREADS='1'),
                               text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    left_alone, forked = (Process(command, folder, *LONGER, name) for name in ('left alone', 'SIGTERM'))
    wait_for(folder/'SIGTERM'/'history.csv', forked.process.is_alive)
    os.kill(forked.pid, signal.SIGTERM)
    wait_for(folder/'SIGINT'/'history.csv', lambda: console.poll() is None)
    console.send_signal(signal.SIGINT)
    err = console.communicate(timeout=60)[1]
    assert left_alone.end()[1] == 0
    answer, exitcode = forked.end()
    return folder, dict(SIGINT=(console.returncode, err), SIGTERM=answer[::2] if answer else (exitcode, ''))

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp('alone')
    assert Process(command, folder, *LONGER, 'run').end()[0][0] == 0
    return folder/'run'

def test_side_by_side(side_by_side, alone):
    assert_same(side_by_side[0]/'left alone', alone)

@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_stopped(side_by_side, alone, name):
    folder, ended = side_by_side
    status, err = ended[name]
    assert status == 130
    assert err.count('\n') == 2 and 'dreamplus resume' in err # after a line of progress
    at, out = load_state(folder/name/'checkpoint'/'state.safetensors')['at'], folder/name
    assert 7 <= at < 50 and not (out/'distilled.json').exists() and not leftovers(out)
    (status, *_), exitcode = Process(command, folder, 'resume', name, '--nets', 0).end()
    assert status == exitcode == 0
    assert_same(out, alone)

def test_killed_from_outside(tmp_path, alone):
    process = Process(command, tmp_path, *LONGER, 'run')
    wait_for(tmp_path/'run'/'history.csv', process.process.is_alive)
    os.kill(process.pid, signal.SIGKILL)
    assert_killed(process)
    assert Process(command, tmp_path, 'resume', 'run', '--nets', 0).end()[0][0] == 0
    assert_same(tmp_path/'run', alone)

class StopCB(Callback):
    "Ctrl-C during inner iteration `at`"
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.dls.at == self.at: os.kill(os.getpid(), signal.SIGINT)

def stopped(out, method, at):
    try: distill(toys(), method, out=out, cbs=[StopCB(at)], **METHODS[method])
    except KeyboardInterrupt: return load_state(out/'checkpoint'/'state.safetensors')['at']

@pytest.mark.parametrize('method, at', [('idc', 1), ('idc', 4), ('idc', 5), ('idc', 10), # 4, 10 report
                                        ('dream', 2), ('dsa', 3)])
def test_stopped_at(tmp_path, undisturbed, method, at):
    assert Process(stopped, tmp_path/'run', method, at).end() == (at, 0)
    assert not (tmp_path/'run'/'distilled.json').exists()
    assert_done(Process(go_on, tmp_path/'run', method))
    assert_same(tmp_path/'run', undisturbed[method])

# What may be resumed

def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    out = tmp_path/'run'
    assert_done(Process(begin, out, 'dream+'))
    before = {name: (out/name).read_bytes() for name in files(out)}
    assert_done(Process(go_on, out, 'dream+'))
    after = {name: (out/name).read_bytes() for name in files(out)}
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= {'distilled.json', 'checkpoint/state.safetensors'} # which hold the seconds spent
    seconds = lambda said: json.loads(said['distilled.json'])['provenance'].pop('seconds')
    assert seconds(before) <= seconds(after)
    assert_same(out, out)

def refused(out, *says, data=None):
    before = {name: (out/name).read_bytes() for name in files(out)}
    with pytest.raises(ValueError) as error: resume(out, data, log=None)
    assert not [part for part in says if part not in str(error.value)], str(error.value)
    assert {name: (out/name).read_bytes() for name in files(out)} == before

def test_other_data_is_refused(undisturbed):
    out = undisturbed['idc']
    refused(out, 'pass the same data')
    refused(out, 'digests differ', data=load_data(toy_images(classes=2, seed=1)))
    refused(out, 'digests differ', data=load_data(toy_images(classes=2), seed=1))

def of_digits(out, part=None, dies=()):
    CheckpointCB.__init__.__defaults__ = 0.,
    data = load_data()
    distill(data.hold_out(part) if part else data, 'idc', out=out, cbs=dies, **SMALL)

def test_data_that_changed_is_refused(tmp_path):
    out = tmp_path/'run'
    assert_killed(Process(of_digits, out, None, [DieCB('after_batch', 3, 0)]))
    info = read_json(out/'run.json')
    info['data']['origin']['seed'] = 1
    write_json(out/'run.json', info)
    refused(out, 'digests differ')

def go_on_alone(out): resume(out, log=None) # with the data that it was distilled from

def test_a_part_held_out_is_part_of_the_data(tmp_path):
    out, whole = tmp_path/'run', tmp_path/'whole'
    assert_killed(Process(of_digits, out, .2, [DieCB('after_batch', 3, 0)]))
    refused(out, 'other data', data=load_data().hold_out(.3))
    refused(out, 'other data', data=load_data().hold_out(.2, seed=1))
    assert_done(Process(of_digits, whole, .2), Process(go_on_alone, out))
    assert_same(out, whole)

