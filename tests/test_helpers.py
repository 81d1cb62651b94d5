"Helpers of a command give what the process alone gives, and end with it."
import io
import os
import signal
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from multiprocessing import current_process
from types import SimpleNamespace

import pytest
import torch
from processes import Process

import dreamplus.judge.evaluate as judge
from dreamplus.cli import main
from dreamplus.data.sources import load_data
from dreamplus.judge.evaluate import score
from dreamplus.loop.distill import distill
from dreamplus.nets.bank import BankTraining, network_bank
from dreamplus.nets.zoo import network
from dreamplus.processes import _Helper as Helper
from dreamplus.processes import dealt, helped, helper_count

def toy(device='cpu', nbytes=0, size=8): return SimpleNamespace(device=torch.device(device), nbytes=nbytes, size=size)

TOY = toy()
ROWS = 'distilled', 'random', 'k-means', 'full'

FEW, USUAL = dict(epochs=0, steps=5), judge.Bench.chooser_args.fget

def short():
    "The network for the embedding is trained for a few steps"
    judge.Bench.chooser_args = property(lambda bench: USUAL(bench) | FEW)

def in_command(f, *args):
    "What `f` returns in a process that may fork helpers, as a command does"
    current_process()._config['daemon'] = False
    torch.set_num_threads(2)
    short()
    with helped(): return f(*args)

def with_helpers(f, *args): return Process(in_command, f, *args).end()[0]

def results(folder, cache=True):
    "A bank, a table, and the networks of the table that this process trained"
    os.environ['DREAMPLUS_CACHE'], lines, here = str(folder), [], []
    digits, train = load_data('digits').select(range(3)), judge.train_fresh
    short()
    bank = network_bank(digits, network(digits, width=8), BankTraining(), None, None, 2, '3')
    dset = distill(digits, 'dm', width=8, outer=1, log=None, factor=1)
    judge.train_fresh = lambda *args: here.append(args[-1]) or train(*args)
    rows = score(dset, digits, n=2, rows=ROWS, log=lambda row: lines.append(row['set']), cache=cache, **FEW)
    weights = [p.detach().numpy() for net in bank.nets for p in net.parameters()]
    return weights, [(r['set'], r['accs'], r['ece']) for r in rows], lines, here

def test_the_results_are_those_of_a_process_alone(tmp_path):
    weights, rows, lines, here = with_helpers(results, tmp_path/'helped')
    alone, expected, _, own = Process(results, tmp_path/'alone').end()[0]
    assert rows == expected and lines == [*ROWS]
    assert not here and len(own) == 8 # the network of the embedding is the first one of `full`
    for ours, theirs in zip(weights, alone, strict=True): assert (ours == theirs).all()
    *_, here = with_helpers(results, tmp_path/'not stored', False)
    assert len(here) == 1 # the helpers cannot read it

def die_in_helper(parent):
    if os.getpid() != parent: os.kill(os.getpid(), signal.SIGKILL)
    return 'here'

def one_dies():
    jobs = [partial(die_in_helper, os.getpid()), *[os.getpid]*3]
    found, again = [*dealt(jobs, TOY)], [*dealt([os.getpid]*2, TOY)]
    return found[0], len({*found[1:]} - {os.getpid()}), {*again} == {os.getpid()}

def test_the_job_of_a_killed_helper_is_done_by_the_command():
    assert with_helpers(one_dies) == ('here', 1, True) # one helper alone is not worth its copy of the data

def stopped(parts):
    "A command that is interrupted while its helpers are at work"
    try:
        for pid in dealt([os.getpid, os.getpid, *[partial(time.sleep, 60)]*2], TOY):
            parts.append(pid)
            if len(parts) == 2: raise KeyboardInterrupt
    except KeyboardInterrupt: return parts

def test_helpers_end_with_the_command():
    pids, until = with_helpers(stopped, []), time.monotonic() + 10
    assert len(pids) == 2
    while any(os.path.exists(f'/proc/{pid}') for pid in pids):
        assert time.monotonic() < until
        time.sleep(.05)

def here():
    "Jobs without data, one job, jobs on a GPU, with many or with large images, and of a kind that cannot be sent"
    kinds = (2, None), (1, TOY), (2, toy('cuda')), (2, toy(nbytes=2**50)), (2, toy(size=2**14))
    cases = [*(([os.getpid]*n, data) for n, data in kinds), ([lambda: os.getpid()]*2, TOY)]
    return os.getpid(), [pid for jobs, data in cases for pid in dealt(jobs, data)]

def test_jobs_that_are_done_here():
    pid, found = with_helpers(here)
    assert {*found} == {pid}

def as_shell(folder, words, argv):
    "Exit status of a command, how many helpers it made and heard of, how many networks it names, and its errors"
    helpers, make, hear = [[], []], Helper.__init__, Helper.answer
    Helper.__init__ = lambda self, threads: helpers[0].append(threads) or make(self, threads)
    Helper.answer = lambda self: helpers[1].append(self) or hear(self)
    current_process()._config['daemon'] = False
    torch.set_num_threads(2)
    folder.mkdir()
    os.chdir(folder)
    os.environ['DREAMPLUS_CACHE'], sys.argv = str(folder), ['dreamplus', *words]
    os.dup2(os.open('errors', os.O_CREAT | os.O_WRONLY), 2)
    sys.stderr = open(2, 'w', closefd=False)
    with redirect_stdout(io.StringIO()) as out: status = main(argv)
    named = out.getvalue().count('network bank: network') + out.getvalue().count('expert ')
    return status, [*map(len, helpers)], named, (folder/'errors').read_text()

BANK = 'bank digits --nets 2 --stages 2 --width 8'.split()
EXPERTS = 'experts digits --n 2 --epochs 1 --width 8'.split()

@pytest.mark.parametrize('words', [BANK, EXPERTS], ids=['bank', 'experts'])
def test_a_command_of_a_shell_has_helpers_but_no_call_in_python(tmp_path, words):
    for argv, expected in (None, [2, 2]), (words, [0, 0]):
        assert Process(as_shell, tmp_path/f'{expected[0]}', words, argv).end()[0][:3] == (0, expected, 2)

def test_an_error_of_a_helper_is_one_line(tmp_path):
    words = [*BANK, '--set', 'bank_lr=1e30']
    status, (made, _), _, errors = Process(as_shell, tmp_path/'shell', words, None).end()[0]
    assert (status, made) == (2, 2) and errors.count('\n') == 1 and 'diverges at bank_lr=1e+30' in errors

def test_how_many(monkeypatch):
    for threads, count in (1, 0), (2, 2), (64, 8):
        monkeypatch.setattr(torch, 'get_num_threads', lambda threads=threads: threads)
        assert helper_count() == count
    for name in 'RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT': monkeypatch.setenv(name, '1')
    assert helper_count() == 0 # the processes of torchrun share the jobs already
