"Only what is comparable shares a table; records of strangers are refused in one line; runs and imported sets meet."
import json
import statistics

import pytest
import torch

from dreamplus.cli import main
from dreamplus.core import read_json, toy_images, write_json
from dreamplus.data.sources import load_data
from dreamplus.judge.evaluate import evaluate_run
from dreamplus.judge.protocols import PROTOCOLS
from dreamplus.judge.sets import evaluate_set
from dreamplus.labs.leaderboard import leaderboard, results_table
from dreamplus.loop.distill import distill

def row(name, *accs): return dict(set=name, acc=statistics.mean(accs), std=.01, n=len(accs), accs=[*accs])

def record(method='dm', acc=.8, **more):
    return dict(dataset='digits', data='75d2', method=method, ipc=1, factor=1, arch='convnet', width=32, seed=0,
                network='convnet 32 instance', protocol='quick', training=dict(mix=.5, soft=None),
                rows=[row('distilled', acc), row('start', .1), row('random', .5, .6)], seconds=dict(distill=5.)) | more

def methods(table): return [line['method'] for line in table['lines']]

@pytest.mark.parametrize('change, says', [
    (dict(data='e9ab'), 'data e9ab, not 75d2'), (dict(protocol='paper'), 'protocol paper, not quick'),
    (dict(network='convnet 32 batch'), 'network convnet 32 batch, not convnet 32 instance'),
    (dict(training=dict(mix=0.)), 'mix 0.0, not 0.5'), (dict(training={}), 'its training is not recorded'),
    (dict(dataset='mnist'), ''), (dict(ipc=10), '')])
def test_tables_of_what_is_not_comparable(change, says):
    board = leaderboard(record('dm'), record('dsa', .9), record('idc', .99, **change))
    assert sorted(map(methods, board), key=len) == [['idc', 'random'], ['dsa', 'dm', 'random']]
    other = next(t for t in board if methods(t)[0] == 'idc')
    assert other['apart'] == says and (f': {says}.' in str(board)) == bool(says)

@pytest.mark.parametrize('change', [
    dict(ipc=1.), dict(training=dict(mix=.5, soft=False)), dict(training=dict(soft=None, mix=.5)), dict(device='cuda'),
    dict(network=None, args=dict(norm='instance', zca=False)), dict(network='convnet 32 instance, whitened')])
def test_one_table_of_what_is_comparable(change):
    other = {k: v for k, v in record('idc', .9, **change).items() if v is not None}
    [table] = leaderboard(record(), other)
    assert methods(table)[0].split(',')[0] == 'idc'

def test_lines_have_the_numbers_of_their_records(tmp_path):
    "also where a folder is given twice; the initialisation is no line; a missing duration stays empty"
    robust = [dict(lrs=.2, ars=.3, soft='kl'), dict(lrs=.4, ars=.5)]
    runs = [record('dm', .8, seed=0), record('dm', .9, seed=1, robust=robust),
            record(None, .85, source='a/res_DC.pt', seconds=dict(distill=None))]
    (tmp_path/'r').mkdir()
    lines = [{}, *runs]
    (tmp_path/'r'/'records.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    board = leaderboard(tmp_path/'r', tmp_path, tmp_path/'r'/'records.jsonl')
    assert str(board).split('\n')[4:] == [
        '| dm | 85.0 ± 7.1 | ± 63.5 | 2 x 1 | 40.0 | 50.0 | 5.0 | r |',
        '| not named | 85.0 |  | 1 x 1 |  |  |  | res_DC.pt |',
        '| random (baseline) | 55.0 ± 5.8 | ± 0.0 | 2 x 2 |  |  |  |  |']

def test_scores_of_other_images_or_protocols_do_not_count(tmp_path):
    write_json(tmp_path/'result.json', record(images='aa'))
    for scores, said in [(dict(protocol='quick', images='aa'), 40.), (dict(protocol='quick'), 40.),
                         (dict(protocol='paper', images='aa'), None), (dict(protocol='quick', images='bb'), None)]:
        write_json(tmp_path/'scores.json', scores | dict(robust=[dict(lrs=.4, ars=.5, soft=None)]))
        found = leaderboard(tmp_path)[0]['lines'][0]['lrs']
        assert found == (None if said is None else .4)

@pytest.mark.parametrize('change, says', [
    (dict(rows=[row('random', .5)]), 'must have one row distilled'), (dict(rows=[]), 'must have one row distilled'),
    (dict(rows=[row('distilled', .5)]*2), 'must have one row distilled'),
    (dict(rows=[row('distilled', 93.2)]), 'rows.0.acc=93.2'),
    (dict(rows=[row('distilled', .5) | dict(n=3)]), 'n=3, but 1 accs'),
    (dict(rows=[row('distilled', .5) | dict(acc=.9)]), 'acc=0.9, but the mean of its accs is 0.5'),
    (dict(method=3), 'method=3'), (dict(ipc=0), 'ipc=0'), (dict(seconds={}), 'seconds.distill is missing'),
    (dict(method='\x1b[2Jbest'), 'cannot be printed'), (dict(robust=[dict(lrs=40., ars=.1)]), 'robust.0.lrs=40.0'),
    (dict(data=None), 'data=None')])
def test_wrong_records_are_refused(tmp_path, capsys, change, says):
    write_json(tmp_path/'theirs.json', [record(), record(**change)])
    assert main(['leaderboard', str(tmp_path/'theirs.json')]) == 2
    [line] = capsys.readouterr().err.strip().split('\n')
    assert 'theirs.json, record 2, is not a record of an evaluation: ' in line and says in line

def test_failed_runs_are_left_out_and_named(tmp_path):
    "also one that a stranger wrote by hand"
    failed = dict(method='mtt', ipc=1, seed=0, failed='no experts'), dict(failed=[1])
    write_json(tmp_path/'theirs.json', [record(), *failed])
    board = leaderboard(tmp_path/'theirs.json')
    assert methods(board[0]) == ['dm', 'random'] and 'no experts' in board.left_out[0] and len(board.left_out) == 2
    assert str(board).endswith(f'* {board.left_out[0]}\n* {board.left_out[1]}')

@pytest.mark.parametrize('text, says', [
    (None, 'does not exist'), ('{', 'is not JSON'), ('7', 'is not a dictionary'), ('[]', 'holds no records'),
    ('[[1]]', 'is not a dictionary')])
def test_other_files_are_refused(tmp_path, text, says):
    if text: (tmp_path/'theirs.json').write_text(text)
    with pytest.raises(ValueError, match=f'theirs.json.* {says}'): leaderboard(tmp_path/'theirs.json')

def test_other_budgets_parts_and_starts_are_not_seeds(tmp_path, monkeypatch):
    "of one method: each has its own line, and other training images have their own table"
    monkeypatch.setitem(PROTOCOLS, 'quick', dict(epochs=1, steps=3))
    data = load_data(toy_images(classes=2, per_class=10))
    runs = dict(a=dict(steps=1), b=dict(steps=2), c=dict(seed=1, steps=2), e={})
    runs |= dict(d=dict(start=torch.zeros(2, 1, 1, 8, 8)), f=dict(start=torch.ones(2, 1, 1, 8, 8)), g=dict(lr=9.))
    runs['twice'], records = runs['a'], [] # the same images as a
    for name, how in runs.items():
        part = data.hold_out(.2) if name == 'e' else data
        distill(part, 'dm', 1, out=tmp_path/name, width=4, outer=4, inner=1, batch_real=4, log=None, **how)
        records.append(evaluate_run(tmp_path/name, part, n=1, rows=('distilled', 'random')))
    for given in [tmp_path], records:
        first, other = leaderboard(*given)
        sets = sorted(len(line['accs']) for line in first['lines'] if not line['baseline'])
        assert sets == [1, 1, 1, 1, 2] and other['apart'] == 'held [0.2, 0], not None' and len(other['lines']) == 2
        [name] = [line['name'] for line in first['lines'] if len(line['accs']) == 2 and not line['baseline']]
        assert name.endswith(', 2 sets') and name[0] != ','
    for given in [tmp_path/name for name in runs], records: assert len(results_table(given).split('\n')) == 2 + 6

def test_a_run_and_an_imported_set_share_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTOCOLS, 'quick', dict(epochs=1, steps=3))
    monkeypatch.setenv('DREAMPLUS_CACHE', str(tmp_path/'cache'))
    data, kw = load_data(toy_images(classes=2, per_class=10)), dict(n=2, rows=('distilled', 'random'))
    dset = distill(data, 'dm', 1, out=tmp_path/'runs'/'dm', width=4, outer=1, inner=1, batch_real=4, log=None)
    distill(data, 'dm', 1, out=tmp_path/'runs'/'half', width=4, outer=1, inner=1, batch_real=4, log=None)
    run = evaluate_run(tmp_path/'runs'/'dm', data, **kw)
    mean, std = (torch.tensor(s)[:, None, None] for s in (dset.mean, dset.std))
    pair = [(dset.pixels - mean)/std, torch.arange(2)] # as DC writes it
    torch.save(dict(data=[pair], accs_all_exps={}), tmp_path/'res_DM_toy_ConvNet_1ipc.pt')
    theirs = evaluate_set(tmp_path/'res_DM_toy_ConvNet_1ipc.pt', data, dict(width=4), tmp_path/'theirs.json', **kw)
    assert theirs['network'] == run['network'] == 'convnet 4 instance' and theirs['seconds']['distill'] is None
    paths = [str(tmp_path/name) for name in ('runs', 'theirs.json')]
    assert main(['leaderboard', *paths, '--out', str(tmp_path/'board.md')]) == 0
    said, board = capsys.readouterr().out, leaderboard(*paths)
    assert (tmp_path/'board.md').read_text() == f'{board}\n' and 'res_DM_toy_ConvNet_1ipc.pt' in said
    assert len(board) == 1 and len(board[0]['lines']) == 3
    assert [line.split(' was not')[0] for line in board.left_out] == [str(tmp_path/'runs'/'half')]
    assert {line['name']: line['accs'] for line in board[0]['lines']} == {
        'dm': [run['rows'][0]['accs']], 'res_DM_toy_ConvNet_1ipc.pt': [theirs['rows'][0]['accs']],
        None: [run['rows'][1]['accs']]}
    assert results_table([read_json(tmp_path/'theirs.json')]).split('\n')[2].endswith('| 2 |  |') # no minutes
    assert float(results_table([run, theirs]).split('\n')[2].split('|')[-2]) == round(dset.provenance['seconds']/60, 1)
