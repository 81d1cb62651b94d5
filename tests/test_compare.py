"A killed comparison continues and ends with the same table; what fails is a line; protocols never mix."
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from fastai.callback.core import Callback
from processes import Process

from dreamplus.cli import main
from dreamplus.core import read_json, toy_images
from dreamplus.data.sources import load_data
from dreamplus.judge.evaluate import ROWS, evaluate_run
from dreamplus.judge.protocols import PROTOCOLS
from dreamplus.judge.validate import ValidAccuracy
from dreamplus.labs import compare as module
from dreamplus.labs.compare import compare, compare_figures, compare_table, load_comparison
from dreamplus.loop.distill import resume
from dreamplus.loop.report import BudgetCB
from dreamplus.nets.zoo import ARCHS
from dreamplus.recipes import METHODS, Method

SMALL = dict(ipc=(1,), seeds=(0, 1), steps=6, nets=2, training=dict(epochs=0, steps=4), width=4,
             rows=('distilled', 'start', 'random', 'full'), batch_real=4, report=2, valid=.2, log=None)
IDC = dict(n_data=8, net_batch=8) # without effect with other methods
PAIR = ['dm', 'idc']

@pytest.fixture(autouse=True)
def _one_thread():
    "As many as the processes that are killed have: another number changes the last bits"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def toys(): return load_data(toy_images(classes=2, per_class=10), test=toy_images(classes=2, per_class=10, seed=1))

def run(out, methods=PAIR, **changes):
    own = IDC if 'idc' in methods else {}
    return compare(toys(), methods, out=out, **SMALL | own | changes)

def columns(table): # without what a clock or the memory says
    keep = 'method', 'factor', 'network', 'accuracy, %', '95 %', 'sets x nets', 'start, %', 'inner iterations'
    lines = [line for line in table.split('\n') if line.startswith('|') and '---' not in line]
    rows = [[text.strip() for text in re.split(r'(?<!\\)\|', line)[1:-1]] for line in lines]
    return [[row[rows[0].index(name)] for name in keep] for row in rows]

def bare(records): # what does not depend on the clock
    return [[r['steps'], [s['accs'] for s in r['rows']],
             [(h['step'], h['loss'], h['valid_acc']) for h in r['history']]]
            for r in records]

def stamps(out, pattern='**/distilled.safetensors'): return {p: p.stat().st_mtime_ns for p in out.glob(pattern)}

def change_records(out, change):
    "Write each record again as `change(record)`, or leave it out where that is None"
    head, *lines = map(json.loads, (out/'records.jsonl').read_text().splitlines())
    kept = [head, *(r for r in map(change, lines) if r is not None)]
    (out/'records.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in kept))

def forget(out, method, seed):
    change_records(out, lambda r: None if (r['method'], r['seed']) == (method, seed) else r)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')/'out'
    return out, run(out)

# Killed and continued

def killed(out, method, seed, at):
    "Dies in one run, with a checkpoint after each inner iteration"
    after = BudgetCB.after_batch
    def dies(self):
        here = self.learn.path.name, self.dls.train.at
        if here == (f'{method}-ipc1-seed{seed}', at): os.kill(os.getpid(), signal.SIGKILL)
        after(self)
    BudgetCB.after_batch = dies
    run(out, checkpoint_seconds=0.)

def test_killed_comparison_ends_with_the_same_table(whole, tmp_path):
    out, resumed = tmp_path/'out', []
    for done, (seed, at) in {2: (0, 1), 3: (1, 5)}.items():
        assert Process(killed, out, 'idc', seed, at).end() == (None, -signal.SIGKILL)
        finished = stamps(out)
        assert len(finished) == done
    with open(out/'records.jsonl', 'a') as f: f.write('{"method": "idc", "ipc": 1, "se') # killed again, while it writes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'resume', lambda out, *args, **kw: resumed.append(out.name) or resume(out, *args, **kw))
        records = run(out)
    assert resumed == ['idc-ipc1-seed1']
    assert {p: t for p, t in stamps(out).items() if p in finished} == finished
    assert bare(records) == bare(whole[1])
    assert columns(compare_table(out)) == columns(compare_table(whole[0]))

def test_finished_comparison_does_nothing(whole, monkeypatch):
    for name in 'distill', 'resume', 'evaluate_run': monkeypatch.delattr(module, name)
    assert run(whole[0]) == whole[1]

def test_half_finished_comparison_is_drawn(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path/'out')
    forget(tmp_path/'out', 'idc', 1)
    counts = {row[0]: row[5] for row in columns(compare_table(tmp_path/'out'))[1:3]}
    assert counts == dict(dm='2 x 2', idc='1 x 2')
    for picture in compare_figures(tmp_path/'out'): assert picture.width > 100

def test_the_table_needs_the_records_only(whole):
    head, *lines = map(json.loads, (whole[0]/'records.jsonl').read_text().splitlines())
    assert compare_table(load_comparison(whole[0])) == compare_table(whole[0])
    assert not [k for line in lines for k in line if head.get(k, ...) == line[k]]
    assert not {'versions', 'training', 'device', 'data', 'protocol'} & set().union(*lines)

# Budgets

def test_every_run_has_the_same_number_of_iterations(whole, tmp_path):
    odd, = run(tmp_path/'out', ['idc'], seeds=(0,), inner=4) # which does not divide the budget
    assert read_json(tmp_path/'out'/'idc-ipc1-seed0'/'run.json')['args']['inner'] == 4
    assert {r['steps'] for r in [odd, *whole[1]]} == {6}
    assert {h['step'] for r in [odd, *whole[1]] for h in r['history']} == {2, 4, 6}

def test_minutes_end_a_run_that_can_be_continued(tmp_path):
    again = dict(seeds=(0,), steps=None, minutes=.4/60, report=None, valid=0.)
    r, = run(tmp_path/'out', ['dm'], **again)
    assert .4 <= r['seconds']['distill'] < 4 and r['steps'] == r['history'][-1]['step'] > 2
    forget(tmp_path/'out', 'dm', 0)
    (tmp_path/'out'/'dm-ipc1-seed0'/'distilled.json').unlink() # killed before it was saved
    assert bare(run(tmp_path/'out', ['dm'], **again)) == bare([r])

def test_progress_is_no_part_of_the_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(ValidAccuracy, 'validate', lambda self, learn: time.sleep(.6) or torch.zeros(()))
    r, = run(tmp_path/'out', ['dm'], seeds=(0,), rows=('distilled',))
    assert len(r['history']) == 3 and r['history'][-1]['seconds'] <= r['seconds']['distill'] + .01 < 1.8

# Arguments

def test_a_run_is_asked_for_once_and_a_folder_may_be_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr(module.Comparison, 'record', lambda self, run: self.args(run))
    best = dict(report=None, bank_folder=tmp_path/'bank', width=8)
    args, = run(tmp_path/'out', ['best'], **dict(seeds=(0, 0), batch_real=None) | best)
    assert args['bank_folder'] == str(tmp_path/'bank')

def test_overrides_reach_the_methods_that_know_them(tmp_path, monkeypatch):
    monkeypatch.setattr(module.Comparison, 'record', lambda self, run: self.args(run))
    given = dict(sampler='representative', interval=3, syn_steps=2, momentum=None)
    idc, dm, mtt = run(tmp_path/'out', ['idc', 'dm', 'mtt'], seeds=(0,), **given)
    assert idc.items() >= dict(sampler='representative', interval=3, n_data=8, outer=1).items()
    assert dm.items() >= dict(interval=3, outer=6).items() and 'syn_steps' not in dm and 'momentum' not in dm
    assert mtt['syn_steps'] == 2 and not {'sampler', 'interval', 'n_data'} & {*mtt}

@pytest.mark.parametrize('methods, given, says', [
    (['idc', 'dm'], dict(warmth=1), "'warmth' is not an argument"),
    (['idc', 'dm'], dict(p=2.), "'p' has no effect here"),
    (['mtt'], dict(batch_real=None, sampler='random'), "sampler='random' has no effect with match='trajectory'"),
    (['idc'], dict(match='embedding', distance='mse', p=2.), "'p' has no effect here"),
    (['idc', 'dm'], dict(n_data=-1), 'n_data=-1 must be'), (['idc'], dict(inner='x'), "inner='x' must be"),
    (['dm'], IDC, "'n_data' has no effect here"),
    (['dm'], dict(nets=0), 'n=0 must be from 1 to 10,000'),
    (['dm'], dict(rows=('random',)), 'must include distilled'),
    (['dm'], dict(steps=2.5), 'steps=2.5 must be a whole number'),
    (['dm'], dict(training=dict(epoch=1)), "'epoch' is not an argument"),
    (['dm'], dict(protocol='x'), "protocol='x' is unknown"), (['dm'], dict(experts=dict(n=0)), 'n=0 must be')])
def test_refused_before_any_work(tmp_path, methods, given, says):
    with pytest.raises(ValueError, match=re.escape(says)): run(tmp_path/'out', methods, **given)
    assert not (tmp_path/'out').exists()

def test_terms_unless_others_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module.Comparison, 'record', lambda self, run: self.plan)
    plan, = compare(toys(), ['dm'], ipc=(1,), out=tmp_path/'out', log=None)
    about = plan['steps'], plan['minutes'], plan['data']['held'], plan['rows']
    assert about == (None, 2, None, ROWS) # no validation unasked

# What fails

def failing(kind, *args):
    "A method that fails when its runs begin"
    class FailCB(Callback):
        def before_fit(self): raise kind(*args)
    return Method(base='dm', cbs=[FailCB])

def test_failing_method_is_a_line_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, 'steep', Method(base='dm', lr=1e30))
    monkeypatch.setitem(METHODS, 'broken', failing(TypeError, 'a | b'))
    out, short = tmp_path/'out', dict(seeds=(0,), rows=('distilled',), steps=2)
    records = run(out, ['steep', 'broken', 'dm'], **short)
    assert ['failed' in r for r in records] == [True, True, False]
    table = compare_table(out)
    assert re.search(r'^\| steep \|.*seed 0: the loss is not finite at inner iteration \d', table, re.M)
    assert re.search(r'^\| broken \|.*seed 0: TypeError: a \\\| b', table, re.M)
    assert len({len(row) for row in columns(table)}) == 1
    monkeypatch.setitem(METHODS, 'broken', METHODS['dm'])
    again = run(out, ['broken', 'dm'], **short)
    assert bare(again)[0] == bare(again)[1] == bare(records[2:])[0]
    assert [r['method'] for r in load_comparison(out) if 'failed' in r] == ['steep'] # the newest line counts

def test_failures_stay_with_their_ipc(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, 'picky', failing(ValueError, 'not today'))
    short = dict(seeds=(0,), rows=('distilled', 'random'), steps=2, valid=0.)
    run(tmp_path/'out', ['picky'], ipc=(1, 2, 3), **short)
    run(tmp_path/'out', ['dm'], **short | dict(ipc=(2,)))
    tables = compare_table(tmp_path/'out').split('\n\n')
    rows = {head.split(',')[1]: [row[0] for row in columns(t)[1:]] for head, t in zip(tables[::2], tables[1::2])}
    assert rows == {' ipc 1': ['picky'], ' ipc 3': ['picky'], ' ipc 2': ['dm', 'random', 'picky']}

def test_full_disk_ends_the_comparison(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, 'full', failing(OSError, 28, 'no space left'))
    with pytest.raises(OSError): run(tmp_path/'out', ['full', 'dm'])
    assert not list((tmp_path/'out').glob('dm-*')) and load_comparison(tmp_path/'out') == []

# Protocols

def test_protocols_never_share_a_table(whole, tmp_path):
    shutil.copytree(whole[0], out := tmp_path/'out')
    with pytest.warns(UserWarning, match='was tested before'):
        other = evaluate_run(out/'dm-ipc1-seed0', toys().hold_out(.2, 0), 'quick', 2, ('distilled',), epochs=0, steps=9)
    other = {k: other[k] for k in ('rows', 'protocol', 'training')}
    change_records(out, lambda r: r | other if (r['method'], r['seed']) == ('dm', 0) else r)
    tables = compare_table(out).split('\n\n')
    assert len(tables) == 4 and ['steps=9' in head for head in tables[::2]].count(True) == 1
    for head, table in zip(tables[::2], tables[1::2]):
        assert sum(row[0] in METHODS for row in columns(table)) == (1 if 'steps=9' in head else 2)

def test_paper_protocols_differ_between_methods(tmp_path):
    run(tmp_path/'out', ['dm', 'datadam', 'dsa'], seeds=(0,), protocol='paper', valid=0., steps=2,
        training=dict(epochs=0, steps=4), rows=('distilled', 'random'))
    tables = compare_table(tmp_path/'out').split('\n\n')[1::2]
    rows = sorted(sorted(row[0] for row in columns(t)[1:]) for t in tables)
    assert rows == [['datadam', 'random'], ['dm', 'dsa', 'random']]

@pytest.mark.parametrize('change', [
    dict(steps=7), dict(steps=None, minutes=1, report=None), dict(protocol='dcbench'), dict(nets=1), dict(width=16),
    dict(valid=0.), dict(training={}), dict(rows=('distilled',))])
def test_folder_keeps_to_its_terms(whole, change):
    with pytest.raises(ValueError, match='compares with .* use the same value, or another'): run(whole[0], **change)

# Experts

def test_experts_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, 'paths', Method(base='mtt', syn_steps=2, max_start=2, expert_epochs=1, lr=1e-4))
    monkeypatch.setitem(METHODS, 'white', Method(base='paths', zca=True))
    short = dict(batch_real=None, experts=dict(n=2, epochs=3), seeds=(0,), steps=2,
                 rows=('distilled',), valid=0.)
    first, = run(tmp_path/'out', ['paths'], **short)
    made = stamps(tmp_path/'out', 'experts*/*.safetensors')
    assert len(made) == 2 and first['experts_seconds'] > 0
    both = run(tmp_path/'out', ['paths', 'white', 'dm'], **short | dict(ipc=(1, 2)))
    after = stamps(tmp_path/'out', 'experts*/*.safetensors')
    assert len(after) == 4 and {p: after[p] for p in made} == made
    assert sorted(p.name for p in (tmp_path/'out').glob('experts*') if p.is_dir()) == [
        'experts-convnet-4-instance', 'experts-convnet-4-instance-zca']
    assert [r.get('failed') for r in both] == [None]*6
    assert [r['experts_seconds'] is None for r in both] == [False, False, True]*2

# From a terminal

def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTOCOLS, 'quick', dict(epochs=0, steps=5))
    monkeypatch.chdir(tmp_path)
    budget = '--methods', 'dm', '--ipc', '1', '--steps', '2', '--width', '4', '--nets', '1', '--set', 'batch_real=4'
    assert main(['compare', 'digits', *budget]) == 0
    out = tmp_path/'comparisons'/'digits'
    assert re.search('^dm +1 +convnet 4', capsys.readouterr().out, re.M)
    assert '| dm | 1 | convnet 4' in (out/'table.md').read_text()
    assert {'table.md', 'accuracy.png', 'grids.png', 'records.jsonl'} <= {p.name for p in out.iterdir()}
    assert main(['compare', '--methods', 'dm', '--steps', '2', '--minutes', '1']) == 2
    assert 'give one of them as the budget' in capsys.readouterr().err
    for taken in 'steps=3', 'valid=.2', 'nets=1':
        assert main(['compare', '--methods', 'mtt', '--set', taken]) == 2
        assert f"--set '{taken}' is not an argument of a part" in capsys.readouterr().err

def test_a_changed_network_is_not_compared_with_what_it_was(tmp_path, monkeypatch):
    class Mine(torch.nn.Module):
        def __init__(self, classes, scale):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
            self.scale, self.fc = scale, torch.nn.Linear(144, classes)
        def forward(self, x): return self.scale*self.fc(self.body(x))
        def embed(self, x): return self.body(x)
        def logits(self, e): return self.scale*self.fc(e)
    own = SMALL | dict(seeds=(0,), steps=2, nets=1, rows=('distilled',), arch='mine', out=tmp_path/'out')
    own.pop('width')
    def run(scale, methods):
        monkeypatch.setitem(ARCHS, 'mine', lambda channels, classes, size: Mine(classes, scale))
        return compare(toys(), methods, **own)
    first = run(1, ['dm'])
    with pytest.raises(ValueError, match="was made when network 'mine' computed something else; use another --out"):
        run(2, ['dm'])
    assert bare(run(1, ['dm'])) == bare(first)

def test_labels_of_a_teacher_beside_a_validation_split(tmp_path):
    "Reports have no teacher, so they train on the labels of the set"
    [done] = run(tmp_path/'out', ['dm'], seeds=(0,), training=dict(epochs=0, steps=4, soft='kl'))
    assert 'failed' not in done and done['history'][-1]['valid_acc'] is not None
