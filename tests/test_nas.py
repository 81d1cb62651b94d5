"Architecture search: what a kill leaves, what a record may be reused for, and that nothing looks at the test split."
import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamplus.apps import nas
from dreamplus.apps.nas import load_search, make_rows, measure, search
from dreamplus.cli import main
from dreamplus.core import Key, toy_images
from dreamplus.data.sources import load_data
from dreamplus.distilled import DistilledSet
from dreamplus.labs.ranks import agreement, kendall
from dreamplus.nets.convnet import ConvNet
from dreamplus.nets.spaces import SPACES, candidates, combinations_of, stratified

SPACE = combinations_of(width=[2, 4], norm=['none', 'batch'])
KW = dict(steps=2, full=4, log=None)

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(per_class=20), test=toy_images(per_class=4, seed=1)).hold_out(.2)

@pytest.fixture
def sets(data):
    return dict(mine=DistilledSet(data.train.x[::16, None]/255, data.classes, [.5], [.25]))

def content(records): # which the clock does not change
    return [{k: {n: v for n, v in r[k].items() if n[:5] != 'early'} if k == 'accs' else r[k]
             for k in ('id', 'spec', 'params', 'accs')} for r in records]

def test_killed_and_continued(tmp_path, data, sets, monkeypatch):
    "Wherever it stops, finished records stay, and the result is that of a search that was not stopped"
    whole = search(data, sets, SPACE, out=tmp_path/'whole', **KW)
    calls = []
    def stops(*args):
        calls.append(args)
        if len(calls) == 3: raise KeyboardInterrupt
        return measure(*args)
    with monkeypatch.context() as patch:
        patch.setattr(nas, 'measure', stops)
        with pytest.raises(KeyboardInterrupt): search(data, sets, SPACE, out=tmp_path/'killed', **KW)
    file = tmp_path/'killed'/'records.jsonl'
    before = file.read_bytes()
    assert content(load_search(tmp_path/'killed')) == content(whole[:2])
    file.write_bytes(before + b'{"id": "half')
    assert content(search(data, sets, SPACE, out=tmp_path/'killed', **KW)) == content(whole)
    assert file.read_bytes().startswith(before) and len(whole) == 4

def test_a_killed_header_is_no_search(tmp_path, data, sets):
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'records.jsonl').write_text('{"sear')
    assert len(search(data, sets, SPACE[:1], out=tmp_path/'out', **KW)) == 1

def test_networks_are_what_they_compute(tmp_path, data, sets, monkeypatch):
    "The same name with another computation is measured again; another name of the same computation is not"
    class Mine(ConvNet):
        def __init__(self, channels, classes, size): super().__init__(channels, classes, size, width=2)
    class Other(ConvNet):
        def __init__(self, channels, classes, size): super().__init__(channels, classes, size, width=2, act='sigmoid')
    Other.__name__ = Other.__qualname__ = 'Mine'
    one, same, other = (search(data, sets, [dict(arch=arch)], out=tmp_path/'out', **KW) for arch in (Mine, Mine, Other))
    assert one == same and one[0]['spec'] == other[0]['spec'] == dict(arch='Mine') and one[0]['id'] != other[0]['id']
    assert len(load_search(tmp_path/'out')) == 2
    assert len(candidates([dict(width=2), dict(act='relu', width=2)], data)) == 1

def test_accuracies_do_not_depend_on_the_other_networks(data, sets):
    rows = make_rows(data, sets, (), steps=2, full=4)
    nets = candidates(SPACE, data)
    alone = measure(nets[1], rows)
    assert content([alone]) == content([measure(c, rows) for c in nets[:2]])[1:]

def test_test_split_is_not_used(tmp_path, data, sets, monkeypatch):
    seen = []
    monkeypatch.setattr(nas, 'accuracy_on', lambda net, split, data: seen.append(split) or .5)
    search(data, sets, SPACE[:1], out=tmp_path/'out', **KW)
    assert {split.x.data_ptr() for split in seen} == {data.valid.x.data_ptr()} and len(seen) == 5

def test_soft_labels_and_classes_without_images(tmp_path, data):
    y = torch.tensor([[.9, .1, 0], [.1, .6, .3]])
    sets = dict(soft=DistilledSet(torch.rand(2, 1, 8, 8), data.classes, [.5], [.25], y=y))
    record, = search(data, sets, SPACE[:1], out=tmp_path/'out', **KW)
    assert [*record['accs']] == ['soft', 'random-ipc1', 'k-means-ipc1', 'full', 'early-ipc1']

def test_too_few_real_images_for_a_baseline(data):
    long = dict(long=DistilledSet(torch.rand(3, 20, 1, 8, 8), data.classes, [.5], [.25]))
    says = '20 images per class are needed, but .* has 16; leave random out of baselines'
    with pytest.raises(ValueError, match=says): make_rows(data, long)
    assert [row.name for row in make_rows(data, long, ('early',))] == ['long', 'full', 'early-ipc20']

@pytest.mark.parametrize('n', [1, 7, 48])
def test_samples_are_balanced(n):
    space = SPACES['convnets']
    chosen = stratified(space, n)
    assert len(chosen) == n == len({json.dumps(s) for s in chosen})
    for name in chosen[0]:
        counts = [sum(s[name] == v for s in chosen) for v in {s[name] for s in space}]
        assert max(counts) - min(counts) <= 1

def run(capsys, *argv):
    status, said = main([*map(str, argv)]), capsys.readouterr()
    return status, said.out, said.err

@pytest.fixture
def here(tmp_path, monkeypatch, data, sets):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'toys').mkdir()
    digits = load_data('digits')
    DistilledSet(digits.train.x[::150]/255, digits.classes, [.3], [.3], y=digits.train.y[::150]).save('set')
    Path('space.json').write_text('[{"width": 2}, {"width": 2, "act": "sigmoid", "norm": "layer", "pool": "max"}]')

def test_command(here, capsys):
    argv = 'nas', 'digits', '--sets', 'set', '--space', 'space.json', '--steps', 2, '--full', 2
    status, out, err = run(capsys, *argv)
    assert status == 0, err
    assert 'early-ipc1' in out and sorted(p.name for p in Path('searches/digits').iterdir() if p.name != '.lock') == [
        'records.jsonl', 'scatter.png', 'table.md']
    head, *lines = [json.loads(line) for line in Path('searches/digits/records.jsonl').read_text().splitlines()]
    assert head['command'].startswith('dreamplus nas digits --sets set') and len(lines) == 2
    assert not re.search(re.escape(str(Path.cwd())), json.dumps([head, lines]))
    before = Path('searches/digits/records.jsonl').read_bytes()
    assert json.loads(run(capsys, *argv, '--json')[1])[1]['id'] == lines[1]['id'] # nothing is measured again
    assert Path('searches/digits/records.jsonl').read_bytes() == before

@pytest.mark.parametrize('argv, says', [
    ('', 'nas needs sets to train on; give --sets RUN,RUN'),
    ('--sets nowhere', 'nowhere'), ('--sets set,./set', 'different names'),
    ('--sets set --space convnet', "space='convnet' is unknown; did you mean 'convnets'?"),
    ('--sets set --space none.json', 'none.json does not exist'),
    ('--sets set --protocol slow', "protocol='slow' is unknown; use one of quick, paper"),
    ('--sets set --sample -1', 'sample=-1 must be at least 1'), ('--sets set --steps 0', 'steps=0 must be at least 1'),
    ('--sets set --baselines best', "baseline 'best' is unknown; use any of random"),
    ('--sets set --set rate=1', "'rate' is not an argument of a protocol"), ('--sets set --set batch=0', 'batch=0'),
    ('--sets set --valid 1', 'must lie between 0 and 1'),
    ('--sets set --space space.json --out set', 'holds files that are not of a search')])
def test_refused(here, capsys, argv, says):
    before = {*Path().rglob('*')}
    status, out, err = run(capsys, 'nas', 'digits', *argv.split())
    assert status == 2 and says in err and re.fullmatch(r'dreamplus: error: .+\n', err), err
    assert {*Path().rglob('*')} == before

def test_intervals_of_many_networks_need_little_memory():
    "and are those of all resamples at once"
    x, y = (np.random.RandomState(seed).rand(120) for seed in (0, 1))
    tracemalloc.start()
    found = agreement(x, y, 200)['kendall']
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    i = Key(0, 'bootstrap').randint(0, 120, 200, 120).numpy()
    assert found[1:] == pytest.approx(np.quantile(kendall(x[i], y[i]), (.025, .975)).tolist(), abs=1e-12)
    assert peak < 50e6 # one array of all pairs of all resamples has 23 MB
