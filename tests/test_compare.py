"A killed comparison goes on where it was and ends with the same table; what fails is a line; protocols never mix."
import os
import re
import shutil
import signal
import time

import pytest
import torch
from processes import Process

from dreamplus.labs import compare as module
from dreamplus.loop.callbacks import CheckpointCB
from dreamplus.cli import main
from dreamplus.labs.compare import compare, compare_figures, compare_table
from dreamplus.core import read_json, toy_images, write_json
from dreamplus.loop.distill import resume
from dreamplus.judge.evaluate import ROWS, evaluate_run
from dreamplus.judge.protocols import PROTOCOLS
from dreamplus.recipes import METHODS
from dreamplus.data.sources import load_data

SMALL = dict(ipc=(1,), seeds=(0, 1), steps=6, nets=2, training=dict(epochs=1, steps=6), width=8,
             rows=('distilled', 'start', 'random', 'full'), n_data=16, net_batch=8, batch_real=4, factor=1, report=2,
             valid=.2, log=None)
PAIR = ['dm', 'idc']

@pytest.fixture(autouse=True)
def _one_thread():
    "As many as the processes that are killed have: another number changes the last bits"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def toys(): return load_data(toy_images(classes=2, per_class=20), test=toy_images(classes=2, seed=1))

def run(out, methods=PAIR, **changes): return compare(toys(), methods, out=out, **SMALL | changes)

def columns(table): # without what a clock or the memory says
    keep = 'method', 'factor', 'network', 'accuracy, %', '95 %', 'sets x nets', 'start, %', 'steps'
    lines = [line for line in table.split('\n') if line.startswith('|') and '---' not in line]
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]
    return [[row[rows[0].index(name)] for name in keep] for row in rows]

def bare(records): # what does not depend on the clock
    return [[r['steps'], [s['accs'] for s in r['rows']],
             [(h['step'], h['loss'], h['valid_acc']) for h in r['history']]] for r in records]

def stamps(out, pattern='**/distilled.safetensors'): return {p: p.stat().st_mtime_ns for p in out.glob(pattern)}

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')/'out'
    return out, run(out)

# Killed and continued

def killed(out, method, seed, at):
    "Dies in one cell, with a checkpoint after each update"
    CheckpointCB.__init__.__defaults__ = 0.,
    after = module.BudgetCB.after_batch
    def dies(self):
        cell = self.report_cb.path.name
        if cell == f'{method}-ipc1-seed{seed}' and self.dls.at == at: os.kill(os.getpid(), signal.SIGKILL)
        after(self)
    module.BudgetCB.after_batch = dies
    run(out)

@pytest.mark.parametrize('seed, at', [(0, 1), (1, 5)])
def test_killed_comparison_ends_with_the_same_table(whole, tmp_path, seed, at):
    assert Process(killed, tmp_path/'out', 'idc', seed, at).end() == (None, -signal.SIGKILL)
    finished = stamps(tmp_path/'out')
    assert len(finished) == 2 + seed
    resumed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'resume', lambda out, *args: resumed.append(out.name) or resume(out, *args))
        records = run(tmp_path/'out')
    assert resumed == [f'idc-ipc1-seed{seed}']
    assert {p: t for p, t in stamps(tmp_path/'out').items() if p in finished} == finished
    assert bare(records) == bare(whole[1])
    assert columns(compare_table(tmp_path/'out')) == columns(compare_table(whole[0]))

def test_finished_comparison_does_nothing(whole, monkeypatch):
    for name in 'distill', 'resume', 'evaluate_run': monkeypatch.delattr(module, name)
    assert run(whole[0]) == whole[1]

def test_half_finished_comparison_is_drawn(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path/'out')
    (tmp_path/'out'/'idc-ipc1-seed1.json').unlink()
    assert [row[5] for row in columns(compare_table(tmp_path/'out'))[1:3]] == ['2 x 2', '1 x 2']
    for picture in compare_figures(tmp_path/'out'): assert picture.width > 100

# Budgets

def test_every_cell_has_the_same_number_of_updates(whole, tmp_path):
    odd, = run(tmp_path/'out', ['idc'], seeds=(0,), inner=4) # which does not divide the budget
    assert read_json(tmp_path/'out'/'idc-ipc1-seed0'/'run.json')['args']['inner'] == 4
    assert {r['steps'] for r in [odd, *whole[1]]} == {6}
    assert {h['step'] for r in [odd, *whole[1]] for h in r['history']} == {2, 4, 6}

def test_minutes_end_a_cell_that_can_be_continued(tmp_path):
    r, = run(tmp_path/'out', ['dm'], seeds=(0,), steps=None, minutes=.4/60)
    assert .4 <= r['seconds']['distill'] < 4 and r['steps'] == r['history'][-1]['step'] > 2
    (tmp_path/'out'/'dm-ipc1-seed0.json').unlink()
    (tmp_path/'out'/'dm-ipc1-seed0'/'distilled.json').unlink() # killed before it was saved
    assert bare(run(tmp_path/'out', ['dm'], seeds=(0,), steps=None, minutes=.4/60)) == bare([r])

def test_progress_is_no_part_of_the_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(module.EvalCB, 'after_epoch', lambda self: time.sleep(1))
    r, = run(tmp_path/'out', ['dm'], seeds=(0,))
    assert len(r['history']) == 3 and r['history'][-1]['seconds'] <= r['seconds']['distill'] + .01 < 2

# What fails

def test_failing_method_is_a_line_and_is_tried_again(tmp_path, monkeypatch):
    def broken(): raise TypeError('a | b')
    monkeypatch.setitem(METHODS, 'steep', dict(paper='', args=METHODS['dm']['args'] | dict(lr=1e30)))
    monkeypatch.setitem(METHODS, 'broken', METHODS['dm'] | dict(cbs=[broken]))
    records = run(tmp_path/'out', ['steep', 'broken', 'dm'], seeds=(0,))
    assert ['failed' in r for r in records] == [True, True, False]
    table = compare_table(tmp_path/'out')
    assert re.search(r'^\| steep \|.*seed 0: the loss is not finite at inner iteration \d', table, re.M)
    assert re.search(r'^\| broken \|.*seed 0: TypeError: a / b', table, re.M)
    assert len({line.count('|') for line in table.split('\n') if line.startswith('|')}) == 1
    monkeypatch.setitem(METHODS, 'broken', METHODS['dm'])
    again = run(tmp_path/'out', ['broken', 'dm'], seeds=(0,))
    assert bare(again)[0] == bare(again)[1] == bare(records[2:])[0]

def test_failures_stay_with_their_ipc(tmp_path, monkeypatch):
    def picky(): raise ValueError('not today')
    monkeypatch.setitem(METHODS, 'picky', METHODS['dm'] | dict(cbs=[picky]))
    run(tmp_path/'out', ['picky'], ipc=(1, 2, 3), seeds=(0,))
    run(tmp_path/'out', ['dm'], ipc=(2,), seeds=(0,))
    tables = compare_table(tmp_path/'out').split('\n\n')
    rows = {head.split(',')[1]: [row[0] for row in columns(t)[1:]] for head, t in zip(tables[::2], tables[1::2])}
    assert rows == {' ipc 1': ['picky'], ' ipc 3': ['picky'], ' ipc 2': ['dm', 'random', 'full', 'picky']}

def test_full_disk_ends_the_comparison(tmp_path, monkeypatch):
    def full(): raise OSError(28, 'no space left')
    monkeypatch.setitem(METHODS, 'full', METHODS['dm'] | dict(cbs=[full]))
    with pytest.raises(OSError): run(tmp_path/'out', ['full', 'dm'])
    assert not list((tmp_path/'out').glob('*-seed*'))

# Protocols

def test_protocols_never_share_a_table(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path/'out')
    file = tmp_path/'out'/'dm-ipc1-seed0.json'
    with pytest.warns(UserWarning, match='was tested before'):
        other = evaluate_run(tmp_path/'out'/'dm-ipc1-seed0', toys().hold_out(.2, 0), 'quick', 2, epochs=1, steps=9)
    write_json(file, read_json(file) | other | dict(training=read_json(file)['training'] | dict(steps=9)))
    tables = compare_table(tmp_path/'out').split('\n\n')
    assert len(tables) == 4 and ['steps=9' in head for head in tables[::2]].count(True) == 1
    for head, table in zip(tables[::2], tables[1::2]):
        assert sum(row[0] in METHODS for row in columns(table)) == (1 if 'steps=9' in head else 2)

def test_paper_protocols_differ_between_methods(tmp_path):
    out = tmp_path/'out'
    run(out, ['dm', 'datadam', 'dsa'], seeds=(0,), protocol='paper', valid=0.,
        training=dict(epochs=0, steps=6), rows=('distilled', 'random'))
    tables = compare_table(out).split('\n\n')[1::2]
    rows = sorted(sorted(row[0] for row in columns(t)[1:]) for t in tables)
    assert rows == [['datadam', 'random'], ['dm', 'dsa', 'random']]

@pytest.mark.parametrize('change', [
    dict(steps=7), dict(steps=None, minutes=1), dict(protocol='dcbench'), dict(nets=1), dict(width=16), dict(valid=0.),
    dict(training={}), dict(rows=('distilled',))])
def test_folder_keeps_to_its_terms(whole, change):
    with pytest.raises(ValueError, match='compares with .* use the same, or another --out'): run(whole[0], **change)

# Experts

def test_experts_are_made_once(tmp_path, monkeypatch):
    paths = dict(syn_steps=2, max_start=2, expert_epochs=1, lr=1e-4)
    monkeypatch.setitem(METHODS, 'paths', METHODS['mtt'] | dict(args=METHODS['mtt']['args'] | paths))
    monkeypatch.setitem(METHODS, 'white', METHODS['mtt'] | dict(args=METHODS['mtt']['args'] | paths | dict(zca=True)))
    args = dict(experts=dict(n=2, epochs=3), seeds=(0,), steps=2)
    first, = run(tmp_path/'out', ['paths'], **args)
    made = stamps(tmp_path/'out', 'experts*/*.safetensors')
    assert len(made) == 2 and first['experts_seconds'] > 0
    both = run(tmp_path/'out', ['paths', 'white', 'dm'], **args | dict(ipc=(1, 2)))
    after = stamps(tmp_path/'out', 'experts*/*.safetensors')
    assert len(after) == 4 and {p: after[p] for p in made} == made
    assert sorted(p.name for p in (tmp_path/'out').glob('experts*') if p.is_dir()) == [
        'experts-convnet-8-instance', 'experts-convnet-8-instance-zca']
    assert [r.get('failed') for r in both] == [None]*6
    assert [r['experts_seconds'] is None for r in both] == [False, False, True]*2

# From a terminal

def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTOCOLS, 'quick', dict(epochs=0, steps=5))
    monkeypatch.chdir(tmp_path)
    budget = '--methods', 'dm', '--ipc', '1', '--steps', '2', '--width', '4', '--nets', '1', '--set', 'batch_real=4'
    assert main(['compare', 'digits', *budget]) == 0
    out = tmp_path/'comparisons'/'digits'
    assert '| dm | 1 | convnet 4' in capsys.readouterr().out
    assert {'table.md', 'accuracy.png', 'grids.png', 'dm-ipc1-seed0.json'} <= {p.name for p in out.iterdir()}
    assert main(['compare', '--methods', 'dm', '--steps', '2', '--minutes', '1']) == 2
    assert 'give one of them, the budget of each cell' in capsys.readouterr().err
    for taken in 'steps=3', 'valid=.2', 'nets=1':
        assert main(['compare', '--methods', 'mtt', '--set', taken]) == 2
        assert f"--set '{taken}' is no argument of a recipe" in capsys.readouterr().err

def test_terms_unless_others_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr('dreamplus.compare._record', lambda f, cell: f.plan)
    plan, = compare(toys(), ['dm'], ipc=(1,), out=tmp_path/'out', log=None)
    assert (plan['steps'], plan['minutes'], plan['data']['held'], plan['rows']) == (
        None, 2, [.1, 0], ROWS)
