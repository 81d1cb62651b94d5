"Hostile files, damaged files, and requests that cannot be carried out: one line, before any work."
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from dreamplus.core import atomic, load_state, read_json, save_state, toy_images, write_json
from dreamplus.data.sources import load_data
from dreamplus.distilled import load_distilled
from dreamplus.files import check_shape
from dreamplus.judge.evaluate import evaluate_run, read_result, remember
from dreamplus.judge.validate import ValidAccuracy
from dreamplus.labs.compare import compare, load_comparison
from dreamplus.labs.study import load_study, study
from dreamplus.loop.distill import distill, resume
from dreamplus.loop.report import read_history
from dreamplus.match.experts import Experts, train_experts
from dreamplus.nets.bank import Bank
from dreamplus.runs import RunFolder, append_record, open_run, read_records

SMALL = dict(outer=2, inner=2, width=4, report=2, log=None)
DEEP = '['*100_000

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(classes=3, per_class=12))

@pytest.fixture(scope='module')
def made(data, tmp_path_factory):
    "A run with its evaluation, experts, and a run under a bank of networks"
    path = tmp_path_factory.mktemp('made')
    distill(data, 'dm', out=path/'run', **SMALL)
    evaluate_run(path/'run', data, n=1, rows=('distilled', 'start'), epochs=0, steps=2)
    train_experts(data, path/'experts', n=1, epochs=3, batch=16, width=4, log=None)
    bank = dict(bank_folder=str(path/'bank'), bank_nets=1, bank_stages='2', stat_images=3, augment='')
    distill(data, 'best', factor=2, **SMALL, **bank)
    return path

@pytest.fixture
def own(made, tmp_path): return shutil.copytree(made, tmp_path/'own')

def contents(folder): return {p: p.is_file() and p.read_bytes() for p in folder.rglob('*') if p.name != '.lock'}

def refuses(call, *says):
    "An error in one line"
    with pytest.raises((ValueError, TypeError)) as e: call()
    text = str(e.value)
    assert '\n' not in text and len(text) < 400
    assert not [part for part in says if part not in text], text

# Files of others

def test_no_writer_follows_a_planted_link(data, tmp_path):
    "The name of a temporary file cannot be guessed, and links in a folder from a stranger lead nowhere"
    victim = tmp_path/'victim'
    victim.write_text('precious')
    def planted(name):
        (tmp_path/name).symlink_to(victim)
        return tmp_path/name
    for name in f'.a.json.{os.getpid()}.tmp', 'a.json': planted(name)
    write_json(tmp_path/'a.json', 1)
    names = set()
    for _ in range(3):
        with atomic(tmp_path/'b') as tmp:
            names.add(tmp.parent.name)
            assert tmp.parent.stat().st_mode & 0o777 == 0o700
            tmp.touch()
    assert len(names) == 3 and not (tmp_path/'a.json').is_symlink()
    refuses(lambda: append_record(planted('records.jsonl'), {}), 'records.jsonl is a link', 'victim')
    (tmp_path/'locked').mkdir()
    (tmp_path/'locked'/'.lock').symlink_to(victim)
    refuses(RunFolder(tmp_path/'locked').acquire, '.lock is a link')
    (tmp_path/'out').mkdir()
    distill(data, 'dm', out=tmp_path/'run', **SMALL)
    (tmp_path/'run'/'distilled.json').unlink(), shutil.rmtree(tmp_path/'run'/'checkpoint')
    (tmp_path/'run'/'checkpoint').symlink_to(tmp_path/'out')
    refuses(lambda: resume(tmp_path/'run', data, log=None), 'checkpoint is a link', 'replace it')
    assert victim.read_text() == 'precious' and not [*(tmp_path/'out').iterdir()]

def test_files_have_the_mode_that_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try: write_json(tmp_path/'a.json', 1)
    finally: os.umask(before)
    assert (tmp_path/'a.json').stat().st_mode & 0o777 == 0o640

@pytest.mark.parametrize('make', [
    lambda data, out: train_experts(data, out, n=1, epochs=1, width=4, log=None),
    lambda data, out: compare(data, ['dm'], (1,), out=out, steps=1, nets=1, valid=0., width=4, log=None),
    lambda data, out: study(data, out, (0,), 1, 1, ('random',), ('random',), ('gradient',), (0,), width=4, log=None),
    lambda data, out: distill(data, 'dm', out=out, **SMALL)], ids=['experts', 'compare', 'study', 'distill'])
def test_hidden_files_are_of_others(data, tmp_path, make):
    "A folder of hidden entries is not empty, and nothing in it is deleted"
    mine = tmp_path/'.git'/'refs'
    mine.mkdir(parents=True)
    for path in mine/'.index.tmp', mine.parent/'.dreamplus-mine.tmp', tmp_path/'.notes.1234.tmp':
        path.write_text('mine')
    before = contents(tmp_path)
    refuses(lambda: make(data, tmp_path), 'holds files that are not', 'use another --out')
    assert contents(tmp_path) == before

def test_only_leftovers_of_writers_are_removed(own):
    for name in '.dreamplus-0a1b2c3d.tmp', 'checkpoint/.dreamplus-0a1b2c3d.tmp':
        (own/'run'/name).mkdir()
        (own/'run'/name/'half').write_text('half')
    for name in '.dreamplus-notes.tmp', '.mine.tmp': (own/'run'/name).write_text('mine')
    (own/'run'/'.dreamplus-link.tmp').symlink_to(own/'experts')
    RunFolder(own/'run').acquire().lock.release()
    left = sorted(p.name for p in (own/'run').rglob('.*') if p.name != '.lock')
    assert left == ['.dreamplus-link.tmp', '.dreamplus-notes.tmp', '.mine.tmp']
    assert Experts(own/'experts').epochs == 3

# Files of another shape

def edits(record, *path):
    "The record with other values at a path"
    for value in None, 'x', [], {}, -1, 5, float('nan'), 10**400, True:
        new = json.loads(json.dumps(record))
        entry = new
        for key in path[:-1]: entry = entry[key]
        if type(value) is type(entry[path[-1]]) and isinstance(value, (str, list, dict)): continue
        entry[path[-1]] = value
        yield new

READERS = {
    'run/run.json': (lambda own, data: open_run(own/'run'), ['seed'], ['data', 'digest'], ['args']),
    'run/distilled.json': (lambda own, data: load_distilled(own/'run'), ['mean'], ['std', 0], ['evaluation', 'mix']),
    'run/result.json': (lambda own, data: read_result(own/'run'), ['rows'], ['rows', 0, 'acc'],
                        ['rows', 0, 'accs', 0]),
    'experts/experts.json': (lambda own, data: Experts(own/'experts'), ['training', 'epochs'], ['net'],
                             ['data', 'mean']),
    'bank/bank.json': (lambda own, data: Bank(own/'bank'), ['net', 'code'], ['data'], ['training']),
    'bank/net000-2.json': (lambda own, data: Bank(own/'bank'), ['accuracy'], ['seconds'], ['net'])}

@pytest.mark.parametrize('name', READERS)
def test_json_of_another_shape(own, data, name):
    "Missing, not JSON, nested too deeply, another kind, out of bounds: the file, the entry and a remedy"
    read, *paths = READERS[name]
    file, good = own/name, read_json(own/name)
    read(own, data)
    for text in '', '{', '[]', '5', DEEP, '"x"', '\ud800':
        file.write_bytes(text.encode('utf-8', 'surrogatepass'))
        refuses(lambda: read(own, data), file.name, '; ')
    for path in paths:
        refused = 0
        for record in edits(good, *path):
            file.write_text(json.dumps(record))
            try: read(own, data)
            except ValueError as e:
                refused += 1
                assert file.name in str(e) and '; ' in str(e) and '\n' not in str(e)
        assert refused >= 6, path
        missing = json.loads(json.dumps(good))
        entry = missing
        for key in path[:-1]: entry = entry[key]
        if isinstance(entry, dict) and path != ['evaluation', 'mix']:
            del entry[path[-1]]
            file.write_text(json.dumps(missing))
            refuses(lambda: read(own, data), f'{file.name} is damaged: {".".join(map(str, path))} is missing')

STATES = {
    'run/checkpoint/state.safetensors': lambda own, data: resume(own/'run', data, log=None),
    'run/distilled.safetensors': lambda own, data: load_distilled(own/'run'),
    'run/start.safetensors': lambda own, data: evaluate_run(own/'run', data, n=1, rows=('distilled', 'start'), steps=1),
    'experts/expert_0000.safetensors': lambda own, data: Experts(own/'experts')[0],
    'bank/net000-2.safetensors': lambda own, data: Bank(own/'bank').members[0].read()}

@pytest.mark.parametrize('name', STATES)
def test_tensors_of_another_shape(own, data, name):
    file, read = own/name, STATES[name]
    good = load_state(file)
    first = next(k for k in ('pixels', 'tau', 'net', 'model') if k in good)
    nan = {k: v*torch.nan for k, v in good[first].items() if v.is_floating_point()} \
        if isinstance(good[first], dict) else good[first]*torch.nan
    wrong = [{}, good | {first: torch.zeros(2)}, good | {first: 5}, good | {first: nan}]
    if name == 'run/distilled.safetensors': wrong.pop() # `doctor` reads it; what needs the images refuses it
    for state in wrong:
        save_state(file, state)
        refuses(lambda: read(own, data), f'{file.name} is damaged', '; ')

@pytest.mark.parametrize('name', [*READERS, *STATES])
def test_reading_does_not_wait_for_a_pipe(own, data, name):
    read = READERS[name][0] if name in READERS else STATES[name]
    (own/name).unlink(), os.mkfifo(own/name)
    refuses(lambda: read(own, data), f'{Path(name).name} is not a regular file')

def test_experts_without_their_tensors(own, data, tmp_path):
    "are found before the run folder is made"
    file = own/'experts'/'expert_0000.safetensors'
    good = load_state(file)
    run = lambda: distill(data, 'mtt', out=tmp_path/'run', experts=str(own/'experts'), max_start=1, expert_epochs=1,
                          syn_steps=1, zca=False, **SMALL | dict(inner=1, report=1))
    short, flat = good['tau'][:2].clone(), good['tau'][0].clone()
    for state in dict(losses=good['losses']), dict(good, tau=short), dict(good, tau=flat):
        save_state(file, state)
        refuses(run, 'expert_0000.safetensors is damaged', 'run `dreamplus experts` again')
    assert not (tmp_path/'run').exists()
    save_state(file, dict(good, tau=good['tau']*torch.nan))
    refuses(lambda: Experts(own/'experts').pair(0, 0, 1), 'weights that are not finite')

def test_records_of_another_shape(tmp_path):
    file = tmp_path/'records.jsonl'
    done = dict(method='dm', ipc=1, seed=0, factor=1, steps=5, peak_mib=9, seconds=dict(distill=1.),
                rows=[dict(set='distilled', acc=.5, std=0., n=1, accs=[.5])])
    def write(*lines): file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    head = dict(plan=dict(overrides={}), dataset='toys', protocol='quick')
    write(head, done)
    assert len(load_comparison(tmp_path)) == 1
    for bad in [], done | dict(rows=5), done | dict(rows=[done['rows'][0] | dict(accs=[5])]), done | dict(seed='0'), {}:
        write(head, bad)
        refuses(lambda: load_comparison(tmp_path), 'records.jsonl, line 2, is damaged', 'remove the line')
    point = dict(outer=1, seconds=1., acc=.5, accs=[.5])
    run = dict(start='a', sampler='b', match='c', warm=0, seed=0, points=[point], oscillation=None, unevenness=.1)
    write(dict(study='iterations'), run)
    assert load_study(tmp_path, warm=0) == [dict(study='iterations') | run]
    for bad in run | dict(points=[point | dict(acc=float('nan'))]), run | dict(warm='0'), 5:
        write(dict(study='iterations'), bad)
        refuses(lambda: load_study(tmp_path), 'records.jsonl, line 2, is damaged')
    file.write_text(DEEP + '\n{}\n')
    refuses(lambda: read_records(file), 'line 1, is damaged')
    (tmp_path/'history.csv').write_text('step,loss,seconds,peak_mib,valid_acc\n1,.5,x,9,\n')
    refuses(lambda: read_history(tmp_path), 'history.csv is damaged')

@pytest.mark.parametrize('text', ['{"result": {}}', '{"result": {"acc": "a", "ece": 0}}', '{"result": null}', '[]',
                                  DEEP, '{"result": {"acc": 5, "ece": 0}}', '{"result": {"acc": NaN, "ece": 0}}', ''])
def test_an_unusable_cache_counts_as_absent(tmp_path, monkeypatch, text):
    monkeypatch.setenv('DREAMPLUS_CACHE', str(tmp_path))
    from dreamplus.arguments import Share
    ask = lambda: remember(dict(row='random'), lambda: dict(acc=.25, ece=.1), shape=dict(acc=Share, ece=Share))
    assert ask() == (dict(acc=.25, ece=.1), False) and ask()[1]
    file, = (tmp_path/'baselines').glob('*.json')
    file.write_text(text)
    assert ask() == (dict(acc=.25, ece=.1), False) and ask()[1]

def test_statistics_of_another_shape_are_computed_again(own, data):
    file, = (own/'bank').glob('*-statistics-*')
    good = load_state(file)
    call = lambda: distill(data, 'best', factor=2, **SMALL, bank_folder=str(own/'bank'), bank_nets=1,
                           bank_stages='2', stat_images=3, augment='')
    known = good['0']
    narrow, nan = known['mean'][:, :2].clone(), known['within']*torch.nan
    for state in dict(mean=5), {'0': dict(known, mean=narrow)}, {'0': dict(known, within=nan)}:
        save_state(file, state)
        call()
        assert torch.equal(load_state(file)['0']['mean'], known['mean'])

def test_a_name_that_is_no_unicode_is_written_and_read(tmp_path):
    "A path may be; a class name is refused, since it becomes the name of a folder and a caption"
    name = os.fsdecode(b'caf\xe9')
    write_json(tmp_path/'a.json', dict(name=name))
    append_record(tmp_path/'a.jsonl', dict(name=name))
    assert read_json(tmp_path/'a.json') == dict(name=name) == read_records(tmp_path/'a.jsonl')[0]

# Refused before work

@pytest.mark.parametrize('given, says', [
    (dict(width=0), 'width=0 must be'), (dict(factor=0), 'factor=0 must be'),
    (dict(experts='nowhere'), 'nowhere holds no'),
    (dict(experts=dict(bogus=1)), "'bogus' is not an argument"), (dict(experts=dict(epochs=1)), 'reach epoch'),
    (dict(experts=dict(lr=float('inf'))), 'lr=inf must'), (dict(depth=9), 'depth=9')])
def test_compare_begins_nothing_that_cannot_be_done(data, tmp_path, given, says):
    out, args = tmp_path/'out', dict(width=4, zca=False) | given
    refuses(lambda: compare(data, ['dm', 'mtt'], (1,), out=out, steps=1, nets=1, valid=0., log=None, **args), says)
    assert not out.exists()

@pytest.mark.parametrize('change, says', [
    (dict(match='nan*gradient'), "weight 'nan'"), (dict(match='1e30*gradient'), "weight '1e30'"),
    (dict(stats=[[.5], [0.]]), 'above 0'), (dict(stats=[[.5], [-1.]]), 'above 0'),
    (dict(stats=[[.5], ['a']]), 'a pair of lists'), (dict(stats=[]), 'a pair of lists'),
    (dict(stats=[[.5], [float('nan')]]), 'finite'), (dict(warm_epochs=1e15), 'warm_epochs'),
    (dict(n_data=10**15), 'n_data'), (dict(width=10**20), 'fit into 64 bits'), (dict(lr=10**400), 'fit into 64 bits'),
    (dict(match='attention', p=1e30), 'p=1e+30'), (dict(match='attention', balance=1e30), 'balance=1e+30'),
    (dict(checkpoint_seconds=-1), 'checkpoint_seconds=-1'), (dict(cbs=5), 'cbs=5 must be a list of callbacks'),
    (dict(metrics=[5]), 'metrics=[5] must be a list of metrics'), (dict(metrics=ValidAccuracy), 'must be a list'),
    (dict(checkpoint_seconds=float('nan')), 'checkpoint_seconds=nan'),
    (dict(net_augment='color_light'), 'net_augment: jitter and light need red, green and blue, but'),
    (dict(eval_augment='imagenet'), 'eval_augment: jitter and light need red')])
def test_distill_begins_nothing_that_cannot_be_done(data, tmp_path, change, says):
    for out in tmp_path/'run', None: refuses(partial(distill, data, 'idc', out=out, **SMALL | change), says)
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('y', [[1e30, 2e30]*9, [2.**60, 2.**60 + 2**9]*9])
def test_labels_that_would_merge(y):
    with pytest.raises(ValueError, match='must be whole numbers'): load_data((toy_images(3, 6)[0], y))

def test_study_begins_nothing_that_cannot_be_done(data, tmp_path):
    args = (0,), 1, 1, ('random',), ('random',), ('gradient',), (0,)
    refuses(lambda: study(data, tmp_path/'out', *args, arch='mlp', log=None), 'no convolution')
    assert not (tmp_path/'out').exists()

def test_experts_that_diverge_are_not_kept(data, tmp_path):
    make = lambda lr: train_experts(data, tmp_path/'e', n=1, epochs=2, batch=8, width=4, lr=lr, log=None)
    refuses(lambda: make(1e30), 'expert 1 diverges at lr=1e+30')
    assert not (tmp_path/'e').exists()
    assert len(make(.01)) == 1 # nothing pins the learning rate

def test_shapes_name_the_entry():
    for value, shape, says in [({}, {'a': int}, 'a is missing'), ({'a': [{'b': 'x'}]}, {'a': [{'b': int}]}, 'a.0.b='),
                               ([1], [(str, None)], '0=1 must be none')]:
        refuses(partial(check_shape, value, shape), says)

def test_files_are_read_whatever_is_there(tmp_path):
    (tmp_path/'a.json').mkdir()
    refuses(lambda: read_json(tmp_path/'a.json'), 'cannot be read (Is a directory)')
    refuses(lambda: load_state(tmp_path/'a.json'), 'a.json')
    assert not [*Path(tmp_path/'a.json').iterdir()]
