"Each benchmark runs, at its smallest, from the command to the record; `test_fast.py` has those of fast paths."
import importlib
import json
import sys
from itertools import pairwise

import benchmarks.__main__
import pytest
import torch
from benchmarks import attention, best, digits, loading, networks, plans, race, scale, unseen
from PIL import Image

from dreamplus import recipes
from dreamplus.core import toy_images
from dreamplus.data.sources import load_data
from dreamplus.judge.protocols import PROTOCOLS
from dreamplus.loop.distill import distill

MODULES = ('__main__', 'alternatives', 'attention', 'best', 'chunks', 'digits', 'gpu', 'loading', 'networks', 'plans',
           'race', 'scale')

@pytest.mark.parametrize('name', MODULES)
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [name, '--help'])
    with pytest.raises(SystemExit) as end: importlib.import_module(f'benchmarks.{name}').main()
    assert end.value.code == 0 and '--out' in capsys.readouterr().out

@pytest.fixture
def record(tmp_path, monkeypatch):
    "The record of a benchmark, as `main` writes it, from networks that are hardly trained"
    monkeypatch.setitem(PROTOCOLS, 'quick', dict(epochs=0, steps=2))
    def run(module, *options):
        monkeypatch.setattr(sys, 'argv', ['benchmark', *map(str, options), '--out', str(tmp_path/'record.json')])
        module.main()
        return json.loads((tmp_path/'record.json').read_text())
    return run

def test_attention(record, monkeypatch):
    monkeypatch.setattr(attention, 'SEEDS', (0,))
    monkeypatch.setattr(attention, 'RATES', (.01,))
    some = 'spatial, p=1', 'and channels, p=4, p_c=1'
    monkeypatch.setattr(attention, 'KINDS', {k: attention.KINDS[k] for k in some})
    found = record(attention, '--steps', 1, '--nets', 1)
    assert [c['kind'] for c in found['starts'] + found['cells']] == ['spatial, p=1', *attention.KINDS]
    assert all(0 < acc < 1 for c in found['cells'] for acc in c['accs'])

def test_digits(record, monkeypatch):
    monkeypatch.setattr(digits, 'SEEDS', (0, 1)) # the training images of both
    monkeypatch.setattr(digits, 'CHANGES', [dict(outer=1, inner=1)])
    found = record(digits, '--nets', 1)
    assert found['images'] == len(digits.common().train) < 1_257
    assert [c['accs'].keys() for c in found['cells']] == [{'distilled', 'random', 'k-means'}]*2

def test_loading(record, tmp_path):
    for name in 'ab':
        (tmp_path/'data'/name).mkdir(parents=True)
        for i in range(5): Image.new('L', (8, 8), 20*i).save(tmp_path/'data'/name/f'{i}.png')
    found = record(loading, tmp_path/'data', '--later', 2)
    assert found['images'] == 10 and len(found['seconds']['later']) == 2

@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Images of 2 classes, on which `best` has a bank of a few steps"
    for name in 'ab':
        (tmp_path/'data'/name).mkdir(parents=True)
        for i in range(10): Image.new('L', (8, 8), 20*i).save(tmp_path/'data'/name/f'{i}.png')
    rows = [dict(args=dict(bank_stages='2', bank_nets=1, stat_images=4, factor=2))]
    monkeypatch.setitem(recipes.published_rows(), 'best', recipes.published_rows()['best'] + rows)
    return tmp_path/'data'

def test_best(record, folder, monkeypatch):
    "A change is an override; an existing record is completed"
    options = folder, '--ipc', 1, '--steps', 1, '--width', 4, '--nets', 1, '--seeds'
    monkeypatch.setattr(best, 'ONE', [dict(teach=0), dict(bank_nets=2)])
    first = record(best, *options, '0')
    both = record(best, *options, '0,1')
    assert both['cells'][:2] == first['cells'] and [c['seed'] for c in both['cells'][2:]] == [1, 1]
    data, weight = load_data(folder), '0.5*gradient'
    assert best.overrides(dict(teach=3), data, 1) == dict(decode='single', match='1*statistics + 3*teach')
    also = dict(match=f'statistics + 1*teach + {weight}', shared_draw=True, lr=.1)
    assert best.overrides(dict(also=weight, lr=.1), data, 1) == dict(decode='single') | also
    assert best.overrides(dict(lr=.1), data, 1) == dict(decode='single', lr=.1)
    assert best.overrides(dict(method='dream+'), data, 1) == dict(method='dream+')
    assert best.overrides(dict(now=True), data, 1) == {}
    data.name = 'mnist' # whose recipe has changed more
    earlier = dict(decode='single', match='statistics + 0.02*teach', lr=.01, factor=1, eval_mix=.5)
    assert best.overrides({}, data, 10) == earlier
    assert best.overrides(dict(factor=2), data, 10) == earlier | dict(factor=2, eval_mix=0)
    assert best.overrides(dict(teach=1/2), data, 10) == earlier | dict(match='1*statistics + 0.01*teach')

def test_race(record, folder):
    "A curve begins before the first inner iteration and ends with the run; the bank is not part of the seconds"
    found = record(race, folder, '--runs', 'idc:random,best', '--ipc', 1, '--steps', 2, '--width', 4, '--minutes', .001)
    slow, ours = found['runs']
    assert [p['step'] for p in ours['points']] == [0, 1, 2] and slow['bank_seconds'] == 0
    for run in found['runs']: assert all(a['seconds'] <= b['seconds'] for a, b in pairwise(run['points']))

def test_networks(record, folder, tmp_path):
    "Each network is trained on each set and on random images"
    for name in 'ab': distill(load_data(folder), 'dm', outer=1, width=4, log=None).save(tmp_path/name)
    found = record(networks, folder, f'{tmp_path/"a"},{tmp_path/"b"}', '--archs', 'mlp,convnet', '--nets', 1)
    rows = [(r['arch'], r['set']) for r in found['rows']]
    assert rows == [(arch, part) for arch in ('mlp', 'convnet') for _ in 'ab' for part in ('distilled', 'random')]

def test_unseen(tmp_path):
    "Classes of CIFAR-10 are joined, and no image is lost"
    names = [name for kind in unseen.KINDS.values() for name in kind.split()]
    for name in names:
        for part in unseen.EACH:
            (tmp_path/'cifar'/part/name).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(tmp_path/'cifar'/part/name/'0.png')
    unseen.join_kinds(tmp_path/'cifar', tmp_path/'kinds')
    data = load_data(tmp_path/'kinds')
    assert data.classes == sorted(unseen.KINDS) and len(data.train) == len(data.test) == len(names) == 10

def test_gpu(record, folder):
    "On the CPU, with a bank of a few steps"
    found = record(benchmarks.__main__, 'gpu', folder, '--width', 4, '--ipc', 1, '--minutes', .002, '--few', 2,
                   '--nets', 1, '--tests', 0)
    assert found['seconds'].keys() == {'best', 'dream+'} and min(found['seconds'].values()) > 0
    assert [row['set'] for row in found['rows']] == ['distilled', 'random-factor'] and found['updates'] > 0
    assert 'gloo' in found['group']['engine'] and found['group']['difference'] < 1e-3

def test_scale(tmp_path):
    "The images of several classes are made from those of one"
    data = load_data(toy_images(classes=2, per_class=8))
    scale.make(tmp_path, [data], classes=6, each=3)
    assert {p.name: len([*p.iterdir()]) for p in (tmp_path/'train').iterdir()} == {f'n{c:04}': 3 for c in range(6)}
    assert len([*tmp_path.glob('val/*/*.JPEG')]) == 6

def test_plans(record, monkeypatch):
    "In this process, without networks of width 128"
    class Done:
        def __init__(self, command, **_): self.code, self.args = command[4], command[5:]
        @property
        def stdout(self):
            said = []
            monkeypatch.setattr(sys, 'argv', ['-c', *self.args])
            exec(self.code, dict(print=said.append)) # noqa: S102
            return said[0]
    monkeypatch.setattr(plans.subprocess, 'run', Done)
    job = 'digits,method=dream+,outer=1,inner=2,width=4,batch_real=8,n_data=8,warm_epochs=0.0'
    check, = record(plans, job)['checks']
    assert check['job'] == job and all(v > 0 for v in check['ratio'].values())
    seconds = torch.tensor([p['seconds'] for p in check['plan']['parts']])
    assert seconds.ge(0).all() and seconds.sum() > 0 # a difference of two timings may be 0
