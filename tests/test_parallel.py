"Several processes give the bits of one, stop together, go on in another number, and say in one line what is wrong."
import itertools
import os
import shutil
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist
from fastai.callback.core import Callback, CancelFitException
from processes import Process, command

from dreamplus.apps.continual import continual
from dreamplus.apps.nas import search
from dreamplus.core import load_state, toy_images
from dreamplus.data.sources import load_data
from dreamplus.distilled import DistilledSet
from dreamplus.judge.evaluate import evaluate_run
from dreamplus.labs.compare import compare
from dreamplus.labs.study import study
from dreamplus.loop import distill as loop
from dreamplus.loop.distill import distill, resume
from dreamplus.loop.report import read_history
from dreamplus.match.core import MATCHERS
from dreamplus.match.distribution import EmbeddingMatcher
from dreamplus.match.experts import train_experts
from dreamplus.parallel import Meetings, SharedNetworks
from dreamplus.processes import JoinedGroup, joined, says_why, this_group

# Processes of one group, as a scheduler would start them

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def set_rank(rank, world, env):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1') | env

def as_rank(rank, world, env, f, *args):
    "What `f` returns in a group; an error as its text, and whether this process says it"
    set_rank(rank, world, env)
    try:
        with joined(seconds=float(os.environ.get('WAIT', 60))): return f(*args)
    except ValueError as e: return f'{"error" if says_why() else "silent"}: {e}'
    except KeyboardInterrupt: return 'stopped'

def as_command(rank, world, env, *argv):
    "What a shell sees of one process of a command"
    set_rank(rank, world, env)
    return command(*argv)

def start(world, f, *args, ranks=None, how=as_rank, **env):
    env = dict(MASTER_PORT=str(free_port())) | env
    return [Process(how, rank, world, env, f, *args) for rank in (range(world) if ranks is None else ranks)]

def answers(processes): return [p.end()[0] for p in processes]

# One distillation

FEW = dict(outer=2, inner=2, width=8, log=None)
REAL = FEW | dict(n_data=16, batch_real=4, net_batch=8)
ONCE = FEW | dict(inner=1, outer=3, batch_real=8)
BANK = FEW | dict(inner=1, outer=3, networks='bank', match='statistics + 3*teach', teacher='last', shared_draw=False,
                  bank_nets=2, bank_stages='2,5', stat_images=5, optimiser='adam', lr=.01, lr_schedule='cosine')
METHODS = {'dream+': REAL | dict(warm_epochs=.02), 'best': BANK, 'dm': ONCE,
           'datadam': ONCE | dict(ipc=[1, 2, 1, 1, 3]),
           'dream': REAL | dict(class_batch=2, interval=2), # some inner iterations have no class of a process
           'idc': REAL | dict(factor=2, ipc=2, optimiser='adamw', pixel_wd=.1, label_lr=.1),
           'dsa': FEW | dict(net_epochs=1, batch_real=4, net_batch=8)}

def five_digits(): return load_data('digits').select(range(5))

def all_methods(folder):
    "The sets of all methods; of two processes also those whose networks rank 0 trains and sends, as on GPUs"
    os.environ['DREAMPLUS_CACHE'] = str(folder) # a bank of its own
    digits = five_digits()
    sets = {name: distill(digits, name, **args) for name, args in METHODS.items()}
    if this_group().world == 2:
        loop.shared = lambda schedule, deal, device: SharedNetworks(schedule, deal.group)
        sets |= {f'{name}, shared': distill(digits, name, **METHODS[name]) for name in ('dream+', 'dsa')}
    return {name: (s.pixels.numpy(), s.labels(decoded=False).numpy()) for name, s in sets.items()}

@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "World to what rank 0 made by all methods"
    return {world: answers(start(world, all_methods, tmp_path_factory.mktemp('cache')))[0] for world in (1, 2, 3)}

@pytest.mark.parametrize('name', METHODS)
def test_pixels_do_not_depend_on_the_number_of_processes(sets, name):
    for world in 2, 3:
        for ours, theirs in zip(sets[world][name], sets[1][name]): assert (ours == theirs).all(), world

@pytest.mark.parametrize('name', ['dream+', 'dsa'])
def test_networks_that_rank_0_trains_and_sends(sets, name):
    assert (sets[2][f'{name}, shared'][0] == sets[1][name][0]).all()

def test_the_classes_of_a_set_have_moved(sets):
    for pixels, _ in sets[3].values(): assert len({*pixels.reshape(len(pixels), -1).std(1).round(5)}) > 4

# Stopped and killed

class SignalCB(Callback):
    "A signal to one process during an inner iteration"
    order = 50
    def __init__(self, number, rank, at): self.number, self.rank, self.at = number, rank, at
    def after_batch(self):
        if this_group().rank == self.rank and self.dls.train.at == self.at:
            (self.learn.path/'signal').touch()
            os.kill(os.getpid(), self.number)

RUN = REAL | dict(warm_epochs=.02, outer=2, inner=5, report=5, interval=2)

def begin(out, *cbs):
    distill(five_digits(), 'dream+', out=out, cbs=cbs, checkpoint_seconds=0., **RUN)
    return this_group().rank

def go_on(out):
    lines = []
    resume(out, five_digits(), log=lines.append, checkpoint_seconds=0.)
    return lines

def pixels(out): return load_state(out/'distilled.safetensors')['pixels']
def checkpoint(out): return load_state(out/'checkpoint'/'state.safetensors')
def losses(out): return [row['loss'] for row in read_history(out)]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')/'run'
    assert answers(start(2, begin, out)) == [0, 1]
    return out

@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    "SIGTERM to one process stops both after the same inner iteration"
    out = tmp_path_factory.mktemp('stopped')/'run'
    assert answers(start(2, begin, out, SignalCB(signal.SIGTERM, 1, 3))) == ['stopped', 'stopped']
    assert 3 <= checkpoint(out)['at'] < 10 and len(checkpoint(out)['model']['pixels']) == 5
    return out

@pytest.mark.parametrize('world', [1, 3])
def test_stopped_in_two_and_resumed_in_another_number(tmp_path, stopped, whole, world):
    out = shutil.copytree(stopped, tmp_path/'run')
    if world == 1: assert Process(go_on, out).end()[1] == 0 # alone, without a group
    else: assert not [line for lines in answers(start(world, go_on, out)) for line in lines if 'resumed' in line]
    assert torch.equal(pixels(out), pixels(whole))
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)

def test_killed(tmp_path, whole):
    "The others end at once, with one line, and the run goes on"
    out = tmp_path/'run'
    first, killed, third = answers(start(3, begin, out, SignalCB(signal.SIGKILL, 1, 7)))
    assert killed is None and time.time() - (out/'signal').stat().st_mtime < 60
    assert sorted(a.split(':')[0] for a in (first, third)) == ['error', 'silent']
    assert 'another process has ended' in first
    assert answers(start(2, go_on, out))[0][-1].split()[0] == '10' # the last report
    assert torch.equal(pixels(out), pixels(whole))

def test_started_again_by_torchrun(tmp_path):
    "The same command goes on; its store outlives the processes"
    store = dist.TCPStore('127.0.0.1', free_port(), is_master=True, wait_for_workers=False)
    agent = dict(MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE='True')
    words = ('distill --method dream+ --outer 1 --inner 6 --width 8 --nets 0 --set report=2 --set n_data=16 '
             '--set batch_real=8 --set warm_epochs=.1').split()
    def once(restart):
        return answers(start(2, tmp_path, *words, how=as_command, TORCHELASTIC_RESTART_COUNT=restart, **agent))
    (status, said, _), (other, silent, _) = once('0')
    assert status == other == 0 and 'run folder: runs' in said and not silent
    (tmp_path/said.split()[-1]/'distilled.json').unlink() # as if it had been killed then
    (_, again, _), _ = once('1')
    assert again.split()[-1] == said.split()[-1]
    assert [p.name for p in (tmp_path/'runs').iterdir()] == ['digits-dream+-ipc1-seed0']
    logs = [(tmp_path/said.split()[-1]/f'log-{rank}.txt').read_text() for rank in range(2)]
    assert all('iteration       loss' in log for log in logs)

# What each rank decides for itself

def by_the_clock(out):
    "Each look at the clock takes 10 ms on rank 0, and 50 ms on rank 1"
    looks, Meetings.seconds = itertools.count(), .01
    time.monotonic = lambda: next(looks)*(.05 if this_group().rank else .01)
    dset = distill(five_digits(), 'dm', out=out, minutes=.02, checkpoint_seconds=.05, **ONCE | dict(outer=None))
    return dset.provenance['steps']

def test_rank_0_decides_by_its_clock(tmp_path):
    "When to report, to save and to stop"
    steps, reports = answers(start(2, by_the_clock, tmp_path/'run')), read_history(tmp_path/'run')
    assert steps[0] == steps[1] == reports[-1]['step'] and len(reports) > 3

class LeaveCB(Callback):
    "Ends the run in one process only"
    def after_batch(self):
        if this_group().rank and self.dls.train.at == 1: raise CancelFitException

def test_a_callback_that_ends_one_process(tmp_path):
    said = answers(start(2, begin, tmp_path/'run', LeaveCB()))
    assert sorted(line.split(':')[0] for line in said) == ['error', 'silent']
    assert all('process 0 is in Meetings.now' in line and 'must decide the same' in line for line in said), said

# What is refused

ERRORS = { # name to world, what a rank does, and what it says
    'ranks': (3, 'dm', dict(classes=[0, 1]), '3 processes are more than the 2 classes; start at most 2'),
    'data': (2, 'dm', dict(differ=True), 'the digest of the data is'),
    'arguments': (2, 'dm', dict(seeds=True), 'seed is 0 in process 0, but 1 in process 1; start all'),
    'batch norm': (2, 'datadam-code', {}, 'batch norm uses the statistics of all classes, so they cannot'),
    'coupled': (2, 'dm', dict(coupled=True), 'Coupled compares classes with each other, so it cannot be distributed')}

def wrong(method, how):
    MATCHERS['coupled'] = type('Coupled', (EmbeddingMatcher,), dict(separable=False))
    rank = this_group().rank
    digits = load_data('digits', seed=rank if 'differ' in how else 0)
    if 'classes' in how: digits = digits.select(how['classes'])
    own = dict(match='coupled') if 'coupled' in how else {}
    distill(digits, method, seed=rank if 'seeds' in how else 0, **ONCE | own)

@pytest.mark.parametrize('name', ERRORS)
def test_refused_in_one_line(name):
    world, method, how, says = ERRORS[name]
    said = answers(start(world, wrong, method, how))
    assert all(says in line for line in said), said
    assert sum(line.startswith('error') for line in said) == 1

def apart(folder, method, how):
    "As on machines without a common disk"
    os.chdir(own := folder/str(this_group().rank))
    os.environ['DREAMPLUS_CACHE'], JoinedGroup.patience = str(own/'cache'), .2
    distill(five_digits(), method, **how)

@pytest.mark.parametrize(('method', 'how', 'left'), [('dm', ONCE | dict(out='run'), []), ('best', BANK, ['cache'])])
def test_a_folder_that_is_not_shared(tmp_path, method, how, left):
    "A run folder, or the cache of the network bank: one line, and no files"
    for rank in '01': (tmp_path/rank).mkdir()
    (tmp_path/'1'/'run').mkdir() # one of the same name is not the same
    said = answers(start(2, apart, tmp_path, method, how))
    assert all('process 1 does not see' in line and 'a disk that all machines share' in line for line in said), said
    assert sum(line.startswith('error') for line in said) == 1
    assert [p.name for p in (tmp_path/'0').iterdir()] == left

def test_a_rank_that_does_not_come_and_a_port_that_is_taken():
    assert answers(start(2, begin, None, ranks=[0], WAIT='.3')) == [
        'error: process 1 of 2 did not come within 0.3 s; start all of them together']
    assert 'process 0 was not found at MASTER_ADDR' in answers(start(2, begin, None, ranks=[1], WAIT='.3'))[0]
    with socket.socket() as s:
        s.bind(('', 0)), s.listen()
        port = str(s.getsockname()[1])
        assert answers(start(2, begin, None, ranks=[0], MASTER_PORT=port)) == [
            f'error: MASTER_PORT={port} is in use on this machine; set another port']

# Independent jobs

TRAINING = dict(epochs=0, steps=5)

def without_seconds(record):
    "A record as it should be for any number of processes"
    if isinstance(record, list): return [*map(without_seconds, record)]
    if not isinstance(record, dict): return record
    gone = 'seconds', 'peak_mib', 'cached', 'experts_seconds', 'bank_seconds', 'test_uses', 'out'
    return {k: without_seconds(v) for k, v in record.items() if k not in gone}

def jobs(run, folder):
    "Records of an evaluation, a comparison, a study, continual learning and a search, and the weights of experts"
    os.environ['DREAMPLUS_CACHE'] = str(folder/'cache')
    digits, small = five_digits(), dict(width=8, log=None)
    result = evaluate_run(run, digits, 'quick', 2, ('distilled', 'random'), again=True, cache=False, **TRAINING)
    compared = compare(digits, ['dm', 'dream+', 'mtt'], (1,), out=folder/'compared', steps=2, nets=1, training=TRAINING,
                       rows=('distilled',), experts=dict(n=2, epochs=1), syn_steps=1, max_start=1, expert_epochs=1,
                       warm_epochs=.1, **small)
    studied = study(digits, folder/'study', (0, 1), 1, 1, ('random',), ('random',), warms=(0,), nets=1, steps=5,
                    n_data=8, inner=2, **small)
    experts = train_experts(digits, folder/'experts', 3, epochs=1, width=8, log=None)
    toys = load_data(toy_images(classes=4, per_class=10), test=toy_images(classes=4, per_class=4, seed=1))
    chained = continual(toys, ['dm', 'random', 'dm-joint'], 2, (2,), out=folder/'chained', orders=2, nets=1,
                        iterations=2, training=TRAINING, batch_real=4, **small)
    own = DistilledSet(toys.train.x[::10, None]/255, toys.classes, [.5], [.25])
    searched = search(toys.hold_out(.2), dict(own=own), [dict(width=2), dict(width=3), dict(width=4)], None,
                      out=folder/'searched', steps=2, full=2, baselines=('random',), log=None)
    records = without_seconds([result, compared, studied, chained, searched])
    return records, [experts[k]['tau'].sum().item() for k in range(3)]

def test_records_do_not_depend_on_the_number_of_processes(tmp_path, whole):
    alone, = answers(start(1, jobs, whole, tmp_path/'alone'))
    one, two, three = answers(start(3, jobs, whole, tmp_path/'three')) # some have no job
    assert one == two == three
    assert one == alone
