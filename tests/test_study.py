"Studies and reproductions at toy scale: equal initial images, resumed runs, and the analysis against plain loops."
import re
import statistics
import time
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from dreamplus.cli import main
from dreamplus.core import read_json, toy_images
from dreamplus.data.core import subset
from dreamplus.data.sources import load_data
from dreamplus.judge import protocols, validate
from dreamplus.judge.validate import ValidAccuracy
from dreamplus.labs import study as st
from dreamplus.labs.reproduce import PUBLISHED, operations, reproduce, tolerance
from dreamplus.labs.study import effects, effects_table, fewer_table, load_study, plot_study, study, times_fewer
from dreamplus.loop.distill import distill
from dreamplus.nets.zoo import ARCHS
from dreamplus.runs import read_records

TINY = dict(width=8, depth=1, inner=2, factor=1, batch_real=8, n_data=16, lr=.3, lr_base=8)
ONE = dict(seeds=(0,), starts=('k-means',), samplers=('random',), matches=('gradient',), warms=(1,))
HALF = dict(matches=('gradient',), warms=(1,))
QUICK = dict(outer=2, every=1, nets=1, steps=3, log=None, **TINY)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(classes=3, per_class=60))

@pytest.fixture(scope='module')
def done(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('study')
    return out, study(data, out, seeds=(0, 1), **HALF, **QUICK)

def timeless(r): return [(p['outer'], p['acc'], p['accs']) for p in r['points']], r['oscillation'], r['unevenness']

# Running

class SeenCB(st.TraceCB):
    def before_fit(self):
        super().before_fit()
        self.initial = self.model.pixels.detach().clone()

def test_all_runs_of_a_seed_and_start_begin_with_the_same_images(data):
    def first(start, sampler, warm, seed):
        trace, metric = SeenCB(start, seed), ValidAccuracy(epochs=0, steps=1)
        distill(data.hold_out(.2), 'dream+', ipc=1, outer=1, sampler=sampler, warm_epochs=warm, seed=seed, cbs=[trace],
                metrics=[metric], log=None, **TINY)
        return trace.initial
    for start in 'random', 'k-means':
        assert torch.equal(first(start, 'random', 0, 0), first(start, 'representative', 2, 0))
    assert not torch.equal(first('random', 'random', 0, 0), first('random', 'random', 0, 1))

def test_records_are_the_factorial(done):
    out, records = done
    keys = [(r['start'], r['sampler'], r['match'], r['warm'], r['seed']) for r in records]
    assert sorted(keys) == sorted(product(*(st.LEVELS | dict(match=('gradient',), warm=(1,), seed=(0, 1))).values()))
    assert sorted(map(timeless, records), key=str) == sorted(map(timeless, load_study(out)), key=str)
    assert [p['outer'] for p in records[0]['points']] == [0, 1, 2]
    assert all(a['seconds'] < b['seconds'] for r in records for a, b in zip(r['points'], r['points'][1:]))

def test_a_network_bank_in_place_of_warming(data, tmp_path, monkeypatch):
    monkeypatch.setenv('DREAMPLUS_CACHE', str(tmp_path/'cache'))
    asked = ONE | dict(warms=(0, 'bank')) | QUICK | dict(bank_stages='3', bank_nets=1)
    fresh, bank = study(data, tmp_path/'study', **asked)
    assert (fresh['warm'], bank['warm']) == (0, 'bank') and bank['bank_seconds'] >= 0 and 'bank_seconds' not in fresh
    assert fresh['points'][0]['acc'] == bank['points'][0]['acc'] and fresh['oscillation'] != bank['oscillation']
    assert [e['levels'] for e in effects([fresh, bank])] == ['bank instead of 0']

def test_a_subset_is_other_data(data, tmp_path):
    "A study of a subset trains on that many images, says so, and is not continued with all images"
    [r] = study(data, tmp_path, images=20, valid=.25, **ONE, **QUICK)
    part = subset(data, 20)
    assert (r['images'], r['data']) == (20, part.digest) and part.hold_out(.25, 0).train.counts == [15]*3
    assert '--images 20' in r['command']
    with pytest.raises(ValueError, match='was made with another'): study(data, tmp_path, valid=.25, **ONE, **QUICK)

def test_held_out_and_never_tested(data, tmp_path, monkeypatch):
    looked, true = [], protocols.logits_on
    def look(net, x, d):
        looked.append(x is d.valid.x)
        return true(net, x, d)
    for module in protocols, validate: monkeypatch.setattr(module, 'logits_on', look)
    study(data, tmp_path, **ONE, **QUICK)
    assert looked == [True]*3

def test_seconds_have_the_start_but_no_measurement(data, tmp_path, monkeypatch):
    def slow(true, seconds):
        def after(*args, **kw):
            time.sleep(seconds)
            return true(*args, **kw)
        return after
    monkeypatch.setattr(st, 'start_pixels', slow(st.start_pixels, .5))
    monkeypatch.setattr(validate, 'train_fresh', slow(validate.train_fresh, 1))
    [r] = study(data, tmp_path, **ONE, **QUICK | dict(outer=1))
    first, last = (p['seconds'] for p in r['points'])
    assert .5 < first < last < 1.5

def test_a_killed_study_goes_on(data, done, tmp_path, monkeypatch):
    true, count, file = st.distill, iter(range(100)), tmp_path/'records.jsonl'
    def killed(*args, **kw):
        if next(count) == 1: raise KeyboardInterrupt
        return true(*args, **kw)
    monkeypatch.setattr(st, 'distill', killed)
    with pytest.raises(KeyboardInterrupt): study(data, tmp_path, seeds=(0,), **HALF, **QUICK)
    kept = file.read_bytes()
    assert len(load_study(tmp_path)) == 1
    file.write_bytes(kept + b'{"seed": 0, "start": "ra') # killed while it wrote
    again = study(data, tmp_path, seeds=(0,), starts=('random',), **HALF, **QUICK)
    assert file.read_bytes().startswith(kept)
    assert [*map(timeless, again)] == [timeless(r) for r in done[1] if r['seed'] == 0 and r['start'] == 'random']

def test_the_first_line_holds_what_all_runs_share(done):
    head, *records = read_records(done[0]/'records.jsonl')
    assert {'command', 'data', 'versions', 'device', 'threads', 'args', 'protocol'} <= head.keys()
    assert {frozenset(r) for r in records} == {frozenset([*st.LEVELS, 'seed', 'points', 'oscillation', 'unevenness'])}
    assert done[1][0] == head | records[0]

def test_a_run_of_other_versions_says_so(data, tmp_path, monkeypatch):
    study(data, tmp_path, **ONE, **QUICK)
    monkeypatch.setattr(st, 'versions', lambda: dict(dreamplus='next'))
    study(data, tmp_path, **ONE | dict(seeds=(0, 1)), **QUICK)
    assert [r['versions']['dreamplus'] == 'next' for r in load_study(tmp_path)] == [False, True]
    assert [' --seeds 0,1 ' in r['command'] for r in load_study(tmp_path)] == [False, True]

def test_other_arguments_are_refused(data, done):
    before = (done[0]/'records.jsonl').read_bytes()
    for change in dict(outer=3), dict(lr=.2), dict(nets=2), dict(steps=4), dict(valid=.3):
        with pytest.raises(ValueError, match='was made with another'):
            study(data, done[0], seeds=(0,), **HALF, **QUICK | change)
    assert (done[0]/'records.jsonl').read_bytes() == before

def test_the_command_makes_the_study_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = dict(outer=1, every=1, nets=1, steps=2, width=8, inner=2, log=None)
    [r] = study(load_data('digits'), 'a', **ONE, **args)
    assert main([*r['command'].split()[1:], '--out', 'b']) == 0
    assert [*map(timeless, load_study('b'))] == [timeless(r)]
    assert re.search('^k-means +random +gradient +1 ', capsys.readouterr().out, re.M)

# Analysis

def fake(rng, setting, seed):
    pace = rng.uniform(1, 2)
    points = [dict(outer=2.*i, seconds=i*pace, acc=rng.random()) for i in range(5)]
    steady = dict(oscillation=rng.random(), unevenness=rng.random())
    return dict(zip(st.LEVELS, setting)) | steady | dict(seed=seed, points=points)

@pytest.fixture(scope='module')
def faked():
    rng = np.random.default_rng(0)
    return [fake(rng, s, seed) for s in product(*st.LEVELS.values()) for seed in range(3)]

def slow_effect(records, name, other, value):
    seeds = {}
    for a in records:
        for b in records:
            rest = all(a[k] == b[k] for k in (*st.LEVELS, 'seed') if k != name)
            if rest and (a[name], b[name]) == (other, st.LEVELS[name][0]):
                seeds.setdefault(a['seed'], []).append(value(a) - value(b))
    means = [sum(d)/len(d) for d in seeds.values()]
    return statistics.mean(means), stats.t.ppf(.975, len(means) - 1)*stats.sem(means)

def slow_at(record, seconds):
    for a, b in zip(record['points'], record['points'][1:]):
        if a['seconds'] <= seconds <= b['seconds']:
            share = (seconds - a['seconds'])/(b['seconds'] - a['seconds'])
            return (1 - share)*a['acc'] + share*b['acc']

def test_effects_against_a_plain_loop(faked):
    end = {s: min(r['points'][-1]['seconds'] for r in faked if r['seed'] == s) for s in range(3)}
    values = {'equal iterations': lambda r: r['points'][-1]['acc'],
              'equal seconds': lambda r: slow_at(r, end[r['seed']]),
              'oscillation': lambda r: r['oscillation']}
    for measure, value in values.items():
        rows = effects(faked, measure)
        assert [e['levels'] for e in rows] == ['k-means instead of random', 'representative instead of random',
                                               'bidirectional instead of gradient', '1 instead of 0', '3 instead of 0']
        for e, other in zip(rows, ('k-means', 'representative', 'bidirectional', 1, 3)):
            assert (e['mean'], e['ci']) == pytest.approx(slow_effect(faked, e['ingredient'], other, value))

def test_an_incomplete_factorial_uses_matched_pairs_only(faked):
    lone = [r for r in faked if r['start'] == 'random' or r['warm'] == 0]
    start = effects(lone)[0]
    assert start['mean'] == pytest.approx(effects([r for r in faked if r['warm'] == 0])[0]['mean'])
    assert effects([r for r in faked if r['seed'] == 0])[0]['ci'] is None
    assert effects([]) == []

def test_times_fewer_against_a_fine_grid(faked):
    setting = 'random', 'gradient', 0
    own, other = ([r for r in faked if r['sampler'] == s and (r['start'], r['match'], r['warm']) == setting]
                  for s in ('representative', 'random'))
    for r in own: r['points'][0]['acc'] = 0.
    goal = np.mean([[p['acc'] for p in r['points'][-3:]] for r in other])
    mean = np.mean([[p['acc'] for p in r['points']] for r in own], 0)
    grid = np.linspace(0, 8, 800_001)
    over = grid[np.interp(grid, np.arange(5)*2, mean) >= goal]
    found = times_fewer(own, other)
    assert found['level'] == pytest.approx(goal)
    assert found['outer'] == pytest.approx(over[0], abs=1e-4)
    assert found['times_outer'] == pytest.approx(8/found['outer'])

def test_tables_and_pictures_take_what_there_is(done, faked):
    for records in (done[1], faked, faked[:1], done[1][:3]):
        lines = fewer_table(records).split('\n')
        assert len({line.count('|') for line in lines}) == 1
        effects_table(records)
        plot_study(records, 'seconds').clear()
    assert len(fewer_table(faked).split('\n')) == 2 + 24

def test_arguments_of_a_part_that_is_chosen(data, tmp_path):
    "have an effect; those without any are refused, not recorded"
    def points(name, **more):
        own = {k: v for k, v in QUICK.items() if k != 'lr_base'}
        return timeless(study(data, tmp_path/name, **ONE, **own, **more)[0])
    adam = points('a', optimiser='adam', lr_schedule='constant')
    assert points('b', optimiser='adam', lr_schedule='constant', beta1=.1) != adam
    for name, value in dict(beta1=.5, statistic='waves', bank_nets=7).items():
        with pytest.raises(ValueError, match=f'{name}=.* has no effect in any run of this study'):
            points('c', **{name: value})
    assert not (tmp_path/'c').exists()

@pytest.mark.parametrize('match, warm, own', [
    ('gradient', 0, dict(batch_real=8)), ('statistics', 'bank', dict(bank_nets=1, bank_stages='2', stat_images=8))])
def test_one_iteration_and_a_matcher_without_real_images(data, tmp_path, match, warm, own):
    how = dict(outer=1, every=1, inner=1, nets=1, steps=3, log=None, width=8, depth=1, factor=1, lr=.3, lr_base=8) | own
    study(data, tmp_path/'out', **ONE | dict(matches=(match,), warms=(warm,)), **how)
    [r] = load_study(tmp_path/'out')
    assert r['unevenness'] is r['oscillation'] is None and effects_table([r]) and fewer_table([r])

# Reproducing

@pytest.fixture
def quick_paper(monkeypatch):
    for name in protocols.PAPERS: monkeypatch.setitem(protocols.PAPERS, name, dict(epochs=0, steps=3))
    monkeypatch.setitem(protocols.PROTOCOLS, 'paper', dict(epochs=0, steps=3))

SMALL = dict(width=8, depth=1, outer=2, inner=2, batch_real=8, n_data=16)

def test_a_reproduction_runs_once_and_is_read_again(data, quick_paper, tmp_path):
    for name, factor in {'dm/cifar10/ipc1': 1, 'dream+/cifar10/ipc10': 2, 'idc/cifar10/ipc1/factor1': 1}.items():
        out = tmp_path/name.replace('/', '-')
        r = reproduce(name, out, (0, 1), 2, data, log=None, **SMALL)
        again = reproduce(name, out, (0, 1), 2, data, log=None, **SMALL)
        assert (r['accs'], r['n'], r['seeds']) == (again['accs'], 4, [0, 1])
        assert read_json(out/'reproduced.json')['accs'] == r['accs']
        assert read_json(out/'seed0'/'run.json')['args']['factor'] == factor
        assert r['acc'] == pytest.approx(statistics.mean(r['accs']))
        assert r['within'] == (abs(r['acc'] - PUBLISHED[name].value) <= tolerance(PUBLISHED[name], r['std']))

def test_seeds_and_seconds_of_a_reproduction_count_once(data, quick_paper, tmp_path):
    "and a path is an argument like its text"
    ask = lambda seeds, **how: reproduce('dm/cifar10/ipc1', tmp_path/'out', seeds, 1, data, log=None, **SMALL | how)
    with pytest.raises(ValueError, match=r'seeds=\(0, 0\) has one twice'): ask((0, 0))
    own = dict(networks='bank', bank_nets=1, bank_stages='30', bank_folder=tmp_path/'bank', n_data=None)
    r, seconds = ask((0,), **own), read_json(tmp_path/'out'/'seed0'/'result.json')['seconds']
    assert r['minutes']*60 == pytest.approx(seconds['distill'] + seconds['evaluate'] + seconds['bank'])
    assert r['changes']['bank_folder'] == str(tmp_path/'bank') == read_json(tmp_path/'out'/'reproduced.json')[
        'changes']['bank_folder']

def test_a_study_has_each_seed_once_and_its_own_reports(data, tmp_path):
    how = dict(outer=1, every=1, inner=1, nets=1, steps=3, log=None, width=8, depth=1, factor=1, batch_real=8)
    assert len(study(data, tmp_path/'out', **ONE | dict(seeds=(0, 0)), **how)) == 1
    with pytest.raises(ValueError, match='report=1 has no effect in a study; give every'):
        study(data, tmp_path/'other', **ONE, **how, report=1)

def test_an_interrupted_reproduction_goes_on(data, quick_paper, tmp_path):
    r = reproduce('dm/cifar10/ipc1', tmp_path/'whole', (0,), 1, data, log=None, **SMALL)
    reproduce('dm/cifar10/ipc1', tmp_path/'cut', (0,), 1, data, log=None, **SMALL)
    for name in ('result.json', 'distilled.json', 'distilled.safetensors'): (tmp_path/'cut'/'seed0'/name).unlink()
    assert reproduce('dm/cifar10/ipc1', tmp_path/'cut', (0,), 1, data, log=None, **SMALL)['accs'] == r['accs']

def test_a_reproduction_with_a_factor_a_start_or_a_wrong_argument(data, quick_paper, tmp_path):
    def again(name, **how):
        return reproduce('dm/cifar10/ipc1', tmp_path/name, (0,), 1, data, log=None, **SMALL, **how)
    again('factor', factor=2)
    assert read_json(tmp_path/'factor'/'seed0'/'run.json')['args']['factor'] == 2
    start = torch.rand(3, 1, 1, 8, 8)
    assert again('start', start=start)['accs'] == again('start', start=start)['accs']
    for change in dict(start=start/2), {}:
        with pytest.raises(ValueError, match='holds a run with another earlier'): again('start', **change)
    for name, value in dict(ipc=2, method='dsa').items():
        with pytest.raises(ValueError, match=f'{name} is given twice; leave {name}='): again('wrong', **{name: value})

def test_the_command_says_whether_it_came_out(quick_paper, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = 'reproduce dm/cifar10/ipc1 digits --nets 1 --set width=8 --set outer=1 --out r'.split()
    published = PUBLISHED['dm/cifar10/ipc1']
    for value, status, verdict in [(500., 1, 'not within the tolerance'), (None, 0, 'within the tolerance')]:
        value = value or read_json('r/reproduced.json')['acc']
        monkeypatch.setitem(PUBLISHED, 'dm/cifar10/ipc1', published._replace(value=value))
        assert main(argv) == status
        out = capsys.readouterr().out
        assert verdict in out and 'README of VICO-UoE/DatasetCondensation' in out and '1 network, seeds 0' in out
        assert 'differs from the publication: data=digits, width=8, outer=1' in out
    assert main(['reproduce', 'dm/digits/ipc1']) == 2

def test_every_published_accuracy_is_listed_and_has_a_cost(capsys):
    assert main(['reproduce', '--list']) == 0
    listed = capsys.readouterr().out
    assert {line.split()[0] for line in listed.split('\n')[1:-1]} == {*PUBLISHED}
    settings = 'dream/cifar10/ipc10', 'idc/cifar10/ipc10', 'idc/cifar10/ipc10/factor1'
    costs = [operations(name)['distil'] for name in settings]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[2]
    assert [operations(f'{m}/cifar10/ipc10')['experts'] > 0 for m in ('mtt', 'dsa')] == [True, False]
    assert all(v > 0 for name in PUBLISHED for k, v in operations(name).items() if k != 'experts')
    assert not any(name.startswith('atom') for name in PUBLISHED) # known from memory alone
    assert tolerance(PUBLISHED['datadam/cifar10/ipc1'], 0) == pytest.approx(2.4)

def test_a_changed_network_needs_another_folder(data, tmp_path, monkeypatch):
    quick = QUICK | dict(arch='mine', outer=1)
    for name in 'width', 'depth': quick.pop(name)
    def run(act):
        def mine(channels, classes, size):
            return nn.Sequential(nn.Conv2d(channels, 4, 3), act(), nn.Flatten(), nn.Linear(144, classes))
        monkeypatch.setitem(ARCHS, 'mine', mine)
        return study(data, tmp_path/'study', **ONE, **quick)
    first = run(nn.ReLU)
    with pytest.raises(ValueError, match='was made with another network; give another folder'): run(nn.Tanh)
    assert timeless(run(nn.ReLU)[0]) == timeless(first[0])
