"Evaluation against plain loops and sums, in other processes, and with caches and records that are damaged."
import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from processes import Process
from torchvision.transforms.v2.functional import resized_crop

from dreamplus.choose.coresets import coreset
from dreamplus.core import Key, load_state, read_json, seeded, toy_images, write_json
from dreamplus.data.core import to_float
from dreamplus.data.sources import load_data
from dreamplus.distilled import DistilledSet, load_distilled
from dreamplus.judge import evaluate as judge, protocols
from dreamplus.judge.evaluate import LEGACY, ROWS, Bench, evaluate_run, score
from dreamplus.labs.leaderboard import results_table
from dreamplus.judge.protocols import (PROTOCOLS, dc_training, evaluation_of, idc_training,
                                       protocol_args, train_fresh, training_steps)
from dreamplus.judge.scores import cross, cross_table, robust, score_run, score_set
from dreamplus.judge.sets import evaluate_set
from dreamplus.judge.validate import BestCB, ValidAccuracy
from dreamplus.loop.distill import distill, resume
from dreamplus.nets.augment import Augment
from dreamplus.nets.train import Stream, sgd
from dreamplus.nets.zoo import ARCHS, create_net
from dreamplus.recipes import METHODS

BRIEF = dict(epochs=0, steps=3)
NET = dict(arch='convnet', width=8)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, 'quick', dict(epochs=1, steps=3)) # also of the network that chooses
    monkeypatch.setenv('DREAMPLUS_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(classes=3, per_class=20)) # 14 of each class to train on

def make_set(data, ipc=1, factor=1, **provenance):
    pixels = to_float(data.train.x[coreset('random', data, ipc, key=Key(0))])
    mean, std = (s.flatten().tolist() for s in (data.mean, data.std))
    return DistilledSet(pixels, data.classes, mean, std, factor, evaluation=NET, provenance=provenance)

@pytest.fixture
def dset(data): return make_set(data)

def accs(rows): return {r['set']: r['accs'] for r in rows}

@pytest.mark.parametrize('change, says', [
    (dict(start=torch.zeros(5, 1, 8, 8)), 'start holds images .5, 1, 8, 8. of'),
    (dict(start=torch.zeros(3, 1, 8, 8, dtype=torch.uint8)), 'of torch.uint8, and'),
    (dict(drops=(2.,)), r'drops=\(2.0,\) must be fractions'), (dict(drops=['a']), "drops=.'a'. must be fractions"),
    (dict(drops=(-.1,)), 'must be fractions'), (dict(rows=('full', 'distilled', 'full')), "row 'full' is given twice"),
    (dict(rows=('random-factor',)), 'no row that is possible .*the factor is 1')])
def test_score_refuses_before_any_training(data, dset, change, says):
    said = []
    with pytest.raises(ValueError, match=says):
        score(dset, data, n=1, log=said.append, **dict(rows=('distilled', 'start')) | BRIEF | change)
    assert not said

def test_a_run_with_a_large_seed(data, tmp_path):
    "The seeds of its networks, 1,000 times that of the run, have 63 bits"
    distill(data, 'dm', outer=1, width=8, seed=2**62 + 1, out=tmp_path/'run', log=None)
    brief = dict(n=1, rows=('distilled',), **BRIEF)
    rows = evaluate_run(tmp_path/'run', data, **brief)['rows']
    assert rows[0]['accs'] == score(load_distilled(tmp_path/'run'), data, seed=1000, **brief)[0]['accs']
    with pytest.raises(ValueError, match='seed=.* must be an integer of at least 0, below 2..64'):
        score(load_distilled(tmp_path/'run'), data, seed=2**70, **brief)

def test_sets_from_arrays_of_numpy(tmp_path):
    "which are float64, with one constant for all channels"
    data = load_data(toy_images(classes=2, per_class=8, channels=3))
    x = torch.rand(2, 1, 3, 8, 8, dtype=torch.float64)
    DistilledSet(x, data.classes, [.5], [.25], evaluation=NET).save(tmp_path)
    dset = load_distilled(tmp_path)
    assert dset.mean == [.5]*3 and torch.equal(dset.pixels, x.flatten(0, 1).float())
    assert score(dset, data, n=1, rows=('distilled',), drops=[.5], **BRIEF)[0]['n'] == 1

# Protocols

@pytest.mark.parametrize('method, epochs, batch, drops, gamma, pick', [
    ('dream+', 1000, 64, [666, 833], .2, 'stack'), ('idc', 1000, 64, [666, 833], .2, 'stack'),
    ('best', 1000, 64, [666, 833], .2, 'stack'), ('dc', 301, 256, [152], .1,
                                                  'one'), ('dsa', 1001, 256, [502], .1, 'one'),
    ('dm', 1001, 256, [502], .1, 'one'), ('datadam', 1801, 64, [902], .1, 'one'), ('mtt', 1001, 256, [502], .1, 'one'),
    ('tesla', 1001, 256, [502], .1, 'one'), ('atom', 1801, 64, [902], .1, 'one')])
def test_paper(method, epochs, batch, drops, gamma, pick):
    p = protocol_args('paper', dict(augment='color', mix=.5, lr=.03, paper=METHODS[method].family), 'cifar10', 10)
    assert (p['epochs'], p['batch'], p['gamma'], p['pick']) == (epochs, batch, gamma, pick)
    assert [round(share*epochs, 9) for share in p['drops']] == drops
    assert training_steps(p, 1000) == epochs*-(-1000//batch)
    assert p['lr'] == (.03 if method in ('mtt', 'tesla') else .01) and p['rebuild'] == (pick == 'one')
    assert p['mix'] == (.5 if pick == 'stack' else 0)
    assert len([op for op in p['augment'].split('_') if op]) == (0 if method == 'dc' else 1 if pick == 'stack' else 6)

def test_old_sets_are_trained_by_the_paper_of_their_method(data):
    "Sets of version 0.1 name no paper; a set that names one keeps it"
    old = make_set(data, method='dsa')
    assert evaluation_of(old) == NET | dict(paper='dsa')
    assert evaluation_of(replace(old, evaluation=NET | dict(paper='mtt')))['paper'] == 'mtt'
    assert evaluation_of(make_set(data)) == evaluation_of(make_set(data, method='unheard of')) == NET

@pytest.mark.parametrize('classes, epochs', [
    (10, [3000, 2000, 1500, 1000, 500, 300]), (100, [2000, 1300, 1000, 600, 300, 200])])
def test_imagenet_epochs(classes, epochs):
    args = [protocol_args('paper', {}, f'imagenet{classes}', n, classes) for n in (1, 10, 50, 200, 500, 501)]
    assert [p['epochs'] for p in args] == epochs
    assert {p['batch'] for p in args} == {128 if classes == 100 else 64}

def test_dcbench_is_one_recipe():
    args = [protocol_args('dcbench', e, 'cifar10', n) for e, n in (
        (dict(paper='dc'), 1), (dict(augment='color', mix=1., lr=3., paper='mtt'), 50))]
    assert args[0] == args[1]

def plain_loop(data, x, y, epochs, batch, drop_after, gamma, rebuild):
    "As the reference codes write it: epochs, batches, and a drop at the end of some epochs"
    with seeded(0):
        net = create_net(channels=1, classes=3, size=8, **NET)
        opt, lr, stream = sgd(net), .01, Stream(len(x), batch, tail=True)
        for epoch in range(epochs):
            for _ in range(-(-len(x)//batch)):
                i = next(stream)
                Augment('').draw(len(i), 8, same_op=True) # goes on with the generator
                loss = F.cross_entropy(net(data.normalize(x[i])), y[i])
                opt.zero_grad(), loss.backward(), opt.step()
            if epoch in drop_after:
                lr *= gamma
                if rebuild: opt = sgd(net, lr)
                for group in opt.param_groups: group['lr'] = lr
    return torch.cat([p.detach().flatten() for p in net.parameters()])

@pytest.mark.parametrize('p, plain, soft', [
    (idc_training(9) | dict(batch=8), dict(epochs=9, batch=8, drop_after=[5, 6], gamma=.2, rebuild=False), True),
    (dc_training(6, augment='', batch=8), dict(epochs=7, batch=8, drop_after=[4], gamma=.1, rebuild=True), False)])
def test_schedule_against_a_plain_loop(data, p, plain, soft):
    "Epochs 0 to E-1 with drops before 2E//3 and 5E//6; and 0 to E with one after E//2+1, the optimiser made anew"
    x, y = to_float(data.train.x[::3]), data.train.y[::3] # 14 images: the last batch is smaller
    if soft: y = torch.rand(len(y), 3).softmax(1)
    net = train_fresh(x, y, data, NET, protocol_args('quick', {}, steps=0, **p))
    fast = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(fast, plain_loop(data, x, y, **plain), rtol=1e-5, atol=1e-7)

def paper_score(folder):
    torch.set_num_threads(1)
    data = load_data(toy_images(classes=3, per_class=20))
    return score(load_distilled(folder), data, 'paper', 1, ('distilled',), device='cpu', epochs=30)[0]['accs']

def test_paper_in_another_process(data, dset, tmp_path):
    "The published protocol on a set that was saved: the same accuracy wherever it is loaded"
    dset.save(tmp_path/'set')
    theirs = Process(paper_score, tmp_path/'set')
    mine = score(dset, data, 'paper', 1, ('distilled',), device='cpu', epochs=30)[0]['accs']
    assert theirs.end() == (mine, 0)

# Rows

def test_rows_that_can_be_had(data):
    "`ROWS` asks for what applies; a row that cannot be made is named in a warning"
    need, one = ['distilled', 'random', 'k-means', 'full'], make_set(data) # at 1 image per class, all coresets are one
    names = lambda dset, **kw: [r['set'] for r in score(dset, data, n=1, **BRIEF, **kw)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert names(one) == need
        soft = replace(one, factor=2, y=torch.eye(3)*.85 + .05)
        assert names(soft, start=one.pixels) == [r for r in ROWS if r not in ('herding', 'k-center')]
    many = replace(one, pixels=one.pixels.repeat_interleave(20, 0), y=one.y.repeat_interleave(20))
    with pytest.warns(UserWarning, match="random: class '0' has 14 of 20 real images; k-means"):
        assert names(many) == ['distilled', 'full']
    with pytest.warns(UserWarning, match="random-factor: class '0' has 14 of 16 real images"):
        assert names(replace(make_set(data, 4), factor=2)) == [*need[:3], 'herding', 'k-center', 'full']
    with pytest.warns(UserWarning, match='herding: at 1 image per class it is the image of k-center'):
        assert names(one, rows=('k-center', 'herding')) == ['k-center']
    with pytest.warns(UserWarning, match='start: no initialisation was kept; random-factor: the factor is 1'):
        assert names(one, rows=('distilled', 'start', 'random-factor')) == ['distilled']

def test_start_and_distilled_are_trained_alike(data, dset):
    for start in dset.pixels, dset.pixels[:, None]: # (N,ch,h,w) and (C,n,ch,h,w)
        rows = accs(score(replace(dset, factor=2), data, n=2, rows=('distilled', 'start'), start=start, **BRIEF))
        assert rows['start'] == rows['distilled']

def test_random_factor_shrinks_real_images(data):
    bench = Bench(replace(make_set(data, 2), factor=2), data, cache=False)
    x, y = bench.images('random-factor')
    assert x.shape == (3*8, 1, 8, 8) and y.tolist() == [c for c in range(3) for _ in range(8)]
    for c in range(3):
        real = F.interpolate(to_float(data.train.x[data.train.y == c]), 4, mode='nearest')
        big = F.interpolate(real, 8, mode='bilinear')
        far = torch.cdist(x.unflatten(0, (3, 8))[c].flatten(1), big.flatten(1)).min(1)
        assert far.values.max() < 1e-4 and len(far.indices.unique()) == 8

def test_classes_of_different_size(data):
    "A baseline has as many images of each class as the set, and is another one for each network"
    even = make_set(data, 3)
    keep = torch.tensor([0, 3, 4, 5, 6, 7])
    uneven = replace(even, pixels=even.pixels[keep], y=even.y[keep], factor=2)
    assert uneven.counts == [1, 3, 2] and uneven.ipc == 2
    bench = Bench(uneven, data, cache=False)
    for row in 'random', 'k-means', 'herding', 'k-center', 'random-factor':
        x, y = bench.images(row)
        times = 4 if row == 'random-factor' else 1
        assert torch.bincount(y).tolist() == [n*times for n in uneven.counts]
        if times == 1:
            real = [data.train.x[data.train.y == c].flatten(1).tolist() for c in range(3)]
            assert all(image.flatten().tolist() in real[c] for image, c in zip(x, y))
    assert not torch.equal(bench.images('random', 0)[0], bench.images('random', 1)[0])
    rows = score(uneven, data, n=1, start=uneven.pixels, **BRIEF)
    assert [r['set'] for r in rows] == [r for r in ROWS if r != 'random-soft']
    assert rows[0]['accs'] == rows[1]['accs'] # distilled and start

def test_soft_labels(data):
    "The set's probabilities train its networks; `random-soft` are the random images with the chooser's"
    soft = replace(make_set(data, 2), y=(3*torch.eye(3).repeat_interleave(2, 0) + torch.rand(6, 3)).softmax(1))
    bench, seen = Bench(soft, data, cache=False), []
    teacher = bench.chooser
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('dreamplus.judge.evaluate.train_fresh', lambda x, y, *a: seen.append((x, y)) or teacher)
        for row in 'distilled', 'random', 'random-soft': bench.test(row, 0)
    (x, y), (real, hard), (same, probabilities) = seen
    assert torch.equal(x, soft.pixels) and torch.equal(y, soft.y)
    assert torch.equal(real, same) and hard.tolist() == [0, 0, 1, 1, 2, 2]
    with torch.no_grad(): own = teacher(data.normalize(to_float(same))).softmax(1)
    torch.testing.assert_close(probabilities, own)

def test_equal_steps(data):
    steps = []
    def spy(net, opt, get, stream, n, *args, **kw): steps.append(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocols, 'train', spy)
        score(make_set(data, 2), data, 'paper', 1, ('distilled', 'random', 'full'), equal_steps=True, cache=False)
    assert [sum(steps[i:i + 3]) for i in (0, 3, 6)] == [1000]*3

def test_best_on_test_is_never_below(data, dset):
    rows = accs(score(dset, data, n=3, rows=('distilled', LEGACY), epochs=0, steps=8))
    assert all(b >= a for a, b in zip(rows['distilled'], rows[LEGACY]))

# The cache

def test_cache(data, dset, cache):
    ask = lambda **kw: score(dset, data, **dict(n=1, rows=('random', 'k-means', 'full'), **BRIEF) | kw)
    plain = ask(cache=False)
    assert not any('cached' in r for r in plain) and not cache.exists()
    first, files = ask(), sorted((cache/'baselines').glob('*.json'))
    assert len(files) == 3 and len([*(cache/'baselines').glob('*.safetensors')]) == 1 # and the network that chose
    key = json.loads(files[0].read_text())
    assert {'row', 'seed', 'data', 'network', 'training', 'stored', 'device', 'versions', 'result'} <= set(key)
    second = ask()
    assert accs(second) == accs(first) == accs(plain) and all(r['cached'] for r in second)
    for f in files: f.write_text('{')
    assert accs(ask()) == accs(first) # damaged files are made again
    assert all(r['cached'] for r in ask())
    for change in dict(steps=4), dict(lr=.02), dict(seed=5), dict(mix=.5):
        assert 'cached' not in ask(rows=('random',), **change)[0], change
    wide = score(replace(dset, evaluation=NET | dict(width=12)), data, n=1, rows=('random',), **BRIEF)
    other = score(dset, load_data(toy_images(classes=3, per_class=20, seed=1)), n=1, rows=('random',), **BRIEF)
    assert 'cached' not in wide[0] and 'cached' not in other[0]

def test_cache_that_cannot_be_written(data, dset, cache):
    cache.write_text('in the way')
    with pytest.warns(UserWarning, match='cannot be written'):
        rows = score(dset, data, n=1, rows=('random',), **BRIEF)
    assert 'cached' not in rows[0]

# Records

SMALL = dict(width=8, n_data=8, batch_real=4, factor=1)

@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')/'run'
    distill(data, 'dream+', out=folder, log=None, outer=1, inner=2, **SMALL)
    return folder

def test_the_start_has_its_own_labels(data, tmp_path):
    "also if learned labels moved an image to another class"
    distill(data, 'dm', 2, out=tmp_path/'run', log=None, outer=1, label_lr=.1, batch_real=4, width=8)
    dset, first = load_distilled(tmp_path/'run'), load_state(tmp_path/'run'/'start.safetensors')
    moved = dset.y.clone()
    moved[1] = moved[1].roll(1) # its most probable class
    replace(dset, y=moved).save(tmp_path/'run')
    assert load_distilled(tmp_path/'run').counts != [2, 2, 2]
    ask = lambda: evaluate_run(tmp_path/'run', data, n=1, rows=('distilled', 'start'), again=True)
    own = replace(dset, pixels=first['pixels'].flatten(0, -4), y=first['labels'].argmax(1))
    alone = score(own, data, n=1, rows=('distilled',))
    with pytest.warns(UserWarning, match='use 2'): ask(), ask()
    assert own.counts == [2, 2, 2] and accs(ask()['rows'])['start'] == accs(alone)['distilled']

def test_a_start_of_other_images_is_refused(data, dset):
    with pytest.raises(ValueError, match='start holds images .6, 1, 8, 8.'):
        score(dset, data, start=make_set(data, 2))

def test_a_wrong_out_is_refused_before_training(data, dset, run, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, 'train_fresh', None)
    dset.save(tmp_path/'set')
    with pytest.raises(ValueError, match='is a folder; give a file'): evaluate_set(tmp_path/'set', data, out=tmp_path)
    with pytest.raises(ValueError, match='is a run, whose result is written to .*result.json'):
        evaluate_set(run, data, out=tmp_path/'r.json')

def test_equal_steps_are_recorded(data, run, tmp_path):
    ask = dict(rows=('distilled', 'random'), n=1, equal_steps=True)
    result = evaluate_run(shutil.copytree(run, tmp_path/'run'), data, **ask)
    assert result['protocol'] == 'quick, equal_steps=True' and result['training']['steps'] == 3
    load_distilled(run).save(tmp_path/'set')
    assert accs(evaluate_set(tmp_path/'set', data, **ask)['rows']) == accs(result['rows'])

def test_the_test_split_is_used_once(data, run):
    ask = lambda **kw: evaluate_run(run, data, **dict(n=1, rows=('distilled', 'random'), **BRIEF) | kw)
    first = ask()
    assert first['test_uses'] == 1 and first['protocol'] == 'quick, epochs=0, steps=3'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        said = []
        assert ask(log=said.append) == first and said == first['rows'] # the record answers
    for uses, kw in (2, dict(again=True)), (3, dict(n=2)), (4, dict(steps=4)):
        with pytest.warns(UserWarning, match=f'use {uses} of the test split'): assert ask(**kw)['test_uses'] == uses
    assert read_json(run/'result.json')['test_uses'] == 4
    with pytest.warns(UserWarning, match='use 5 of the test split'):
        assert score_run(run, data, ('convnet',), n=1, **BRIEF)['test_uses'] == 5
    with pytest.warns(UserWarning, match='use 6 of the test split'): assert ask(n=3)['test_uses'] == 6
    for name in 'result.json', 'scores.json': (run/name).write_text('{')
    assert ask()['test_uses'] == 1

def test_scores_of_a_run(data, run):
    record = score_run(run, data, ('mlp',), n=1, soft='mse', **BRIEF)
    assert record == read_json(run/'scores.json')
    dset, own = load_distilled(run), dict(n=1, seed=0, cache=False, **BRIEF)
    assert [(r['arch'], r['set']) for r in record['cross']] == [('mlp', 'distilled'), ('mlp', 'random')]
    assert record['cross'][0]['accs'] == cross([dset], data, ('mlp',), **own)[0]['accs']
    assert record['robust'][1]['ars'] == robust(dset, data, soft='mse', **own)['ars']
    assert {'versions', 'data', 'device', 'seed', 'protocol', 'test_uses'} <= set(record)
    before = (run/'scores.json').read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter('error') # nothing was tested that a warning could count
        for kw in dict(soft='hard'), dict(archs=('resnetap99',)), dict(protocol='fast'):
            with pytest.raises(ValueError, match='is unknown'): score_run(run, data, **dict(n=1) | kw)
    assert (run/'scores.json').read_bytes() == before

@pytest.mark.parametrize('how, says', [
    (dict(width=16), 'network'), (dict(factor=2), 'factor'), (dict(stats=([.5], [.2])), 'mean and std')])
def test_scores_join_only_the_record_of_their_networks(data, dset, tmp_path, how, says):
    "and of the set as it was read for them"
    torch.save([dset.pixels, dset.y], tmp_path/'set.pt')
    usual, file = dict(factor=1, width=8), tmp_path/'r.json'
    evaluate_set(tmp_path/'set.pt', data, usual, file, n=1, rows=('distilled',), **BRIEF)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f'r.json is a record of other {says};'):
        score_set(tmp_path/'set.pt', data, usual | how, file, ('convnet',), n=1, **BRIEF)
    assert file.read_bytes() == before
    score_set(tmp_path/'set.pt', data, usual, file, ('convnet',), n=1, **BRIEF)
    assert read_json(file)['network'] == 'convnet 8 instance' and 'robust' in read_json(file)
    with pytest.raises(ValueError, match='is a record of other protocol;'):
        score_set(tmp_path/'set.pt', data, usual, file, ('convnet',), n=1, equal_steps=True, **BRIEF)
    equal = score_set(tmp_path/'set.pt', data, usual, None, ('convnet',), n=1, equal_steps=True, **BRIEF)
    assert equal['protocol'] == 'quick, epochs=0, equal_steps=True, steps=3'

def test_faster_ways_are_protocols_of_their_own(data, run, monkeypatch):
    "They keep to the accuracy here, share no table, and are refused before any work where nothing compiles"
    ask = lambda **kw: evaluate_run(run, data, n=1, rows=('distilled', 'full'), **kw)
    slow, fast = ask(steps=15), ask(steps=15, bf16=True)
    assert fast['protocol'] == 'quick, bf16=True, steps=15' and fast['training']['bf16'] is True
    assert 'bf16' not in slow['training']
    for a, b in zip(slow['rows'], fast['rows']): assert abs(a['acc'] - b['acc']) < .2
    def fails(f): raise RuntimeError('no compiler')
    monkeypatch.setattr(torch, 'compile', fails)
    before = (run/'result.json').read_bytes()
    with warnings.catch_warnings(), pytest.raises(ValueError, match='compiled=True needs a C'):
        warnings.simplefilter('error')
        ask(compiled=True)
    assert (run/'result.json').read_bytes() == before

def test_start_of_a_run_is_a_row(data, run):
    rows = evaluate_run(run, data, n=1, rows=('start', 'distilled'), **BRIEF)['rows']
    assert [r['set'] for r in rows] == ['start', 'distilled']

# Validation

class Scripted(ValidAccuracy):
    "Gives accuracies from a list, and keeps the pixels that it saw"
    def __init__(self, worth):
        super().__init__()
        self.worth, self.seen = worth, {}
    def measure(self, learn, seed=0):
        at = learn.dls.train.at
        self.seen[at] = learn.model.pixels.detach().clamp(0, 1).clone()
        return 1. - self.worth[at], self.worth[at]

class StopCB(Callback):
    order = 90
    def __init__(self, at): self.at = at
    def after_batch(self): self.learn.checkpoint_cb.stop = self.dls.train.at == self.at

@pytest.mark.parametrize('worth, best, stop', [([.1, .3, .5, .2, .5], 2, 3), ([.6, .3, .5, .2, .4], 0, 1)])
def test_best_of_the_reports_is_kept(data, tmp_path, worth, best, stop, capsys):
    "Also of a run that was stopped and resumed; the initialisation counts, the first of two equals wins"
    held, out = data.hold_out(.25), tmp_path/'run'
    args = dict(outer=2, inner=2, report=1, lr=.05, log=None, **SMALL)
    whole, stopped, again = (Scripted(worth) for _ in range(3))
    dset = distill(held, 'dream+', cbs=[BestCB()], metrics=[whole], **args)
    assert len({x.sum().item() for x in whole.seen.values()}) == 5
    assert torch.equal(dset.pixels, whole.seen[best])
    with pytest.raises(KeyboardInterrupt):
        distill(held, 'dream+', out=out, cbs=[BestCB(), StopCB(stop)], metrics=[stopped], **args)
    with pytest.raises(ValueError, match='the run was started with best_cb; pass such'): resume(out, held, log=None)
    cb = BestCB()
    assert torch.equal(resume(out, held, [cb], [again], log=None).pixels, dset.pixels) and 0 not in again.seen
    assert cb.best == worth[best]
    assert capsys.readouterr().out == ''

def test_a_report_has_no_teacher(data):
    with pytest.raises(ValueError, match="soft='kl' needs a teacher"): ValidAccuracy(soft='kl')

def test_measuring_changes_no_pixel(data):
    held, metric = data.hold_out(.25), ValidAccuracy(nets=2, **BRIEF)
    args = dict(outer=1, inner=2, report=1, log=None, **SMALL)
    assert torch.equal(distill(held, 'dream+', metrics=[metric], **args).pixels, distill(held, 'dream+', **args).pixels)
    assert len(metric.accs) == 2
    with pytest.raises(ValueError, match='data has no validation split'):
        distill(data, 'dream+', metrics=[ValidAccuracy()], **args)

# Tables

def record(folder, name, protocol, seed, distilled, full):
    (folder/name).mkdir()
    rows = [dict(set='full', accs=full), dict(set='distilled', accs=distilled)]
    cell = dict(dataset='toys', method='idc', ipc=1, factor=1, arch='convnet', width=8, protocol=protocol, seed=seed)
    write_json(folder/name/'result.json', cell | dict(rows=rows, seconds=dict(distill=90)))
    return folder/name

def test_a_table_never_mixes_protocols(tmp_path):
    runs = [record(tmp_path, 'a', 'quick', 0, [.8, .9], [.95]), record(tmp_path, 'b', 'paper', 0, [.9, .9], [.99, .97]),
            record(tmp_path, 'c', 'quick', 1, [.7, .8], [.97])]
    quick, paper = results_table(runs).split('\n\n')
    head, _, *lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in quick.split('\n')]
    assert head[6:] == ['distilled', 'full', '95 %', 'nets', 'minutes to distil'] # no column without a row
    # all four networks make the mean and the spread; the interval is of two sets: 12.706*sqrt(.005/2) = .635...
    assert lines == [['toys', 'idc', '1', '1', 'convnet 8', 'quick', '80.0 ± 8.2', '96.0 ± 1.4', '± 63.5', '4', '1.5']]
    assert 'paper' in paper and 'quick' not in paper and '90.0 ± 0.0' in paper

# Across networks, robust scores

def test_cross_pools_the_sets_of_a_method(data):
    sets = [make_set(data, method='idc'), make_set(data, method='idc'), make_set(data, 2, method='dm')]
    records = cross(sets, data, ('convnet', 'mlp'), n=2, **BRIEF)
    assert [(r['ipc'], r['arch'], r['n']) for r in records[1:3]] == [(1, 'mlp', 2), (1, 'convnet', 2)]
    lines = cross_table(records).split('\n')
    assert [line.split('|')[1:4] for line in lines[2:]] == [[' idc ', ' 1 ', ' 1 '], [' dm ', ' 2 ', ' 1 ']]
    both = torch.tensor(records[0]['accs'] + records[2]['accs'])*100
    assert lines[2].split('|')[4].strip() == f'{both.mean():.1f} ± {both.std():.1f}'

def test_cross_refuses_before_any_work(data, dset, monkeypatch):
    monkeypatch.setattr(protocols, 'train', None) # no network may be trained
    for archs, says in ((('mlp', 'resnetap10'), 'use a ConvNet'), (('convnet', 'alexnett'), 'is unknown'),
                        (('mlp', 'convnet', 'mlp'), "archs has 'mlp' twice; give each network once")):
        with pytest.raises(ValueError, match=says): cross([dset], data, archs, n=1)

def test_scores_refuse_before_any_work(data, run, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, 'train', None) # no network may be trained
    big = replace(make_set(data, 14), y=torch.arange(3).repeat_interleave(torch.tensor([16, 13, 13])))
    big.save(tmp_path/'big')
    twice, short = ('mlp', 'mlp'), "the scores need random images, but class '0' has 14 of 16 real images"
    with warnings.catch_warnings():
        warnings.simplefilter('error') # nothing was tested that a warning could count
        for ask, says in ((lambda: score_set(tmp_path/'big', data, archs=('mlp',)), short),
                          (lambda: robust(big, data), short),
                          (lambda: score_set(tmp_path/'big', data, archs=twice), "archs has 'mlp' twice"),
                          (lambda: score_run(run, data, twice), "archs has 'mlp' twice")):
            with pytest.raises(ValueError, match=says): ask()

@pytest.mark.parametrize('soft, own', [('mse', False), (None, True)])
def test_robust_is_made_of_rows(data, dset, soft, own):
    if own: dset = replace(dset, y=torch.eye(3)*.7 + .1)
    scores, rand = robust(dset, data, n=1, soft=soft, **BRIEF), 'random-soft' if own else 'random'
    def ask(dset, **kw):
        rows = score(dset, data, n=1, rows=('distilled', rand, 'full'), **BRIEF | kw)
        return {r['set']: r['acc'] for r in rows}
    hard = replace(dset, y=torch.arange(3))
    classes = {r['set']: r['acc'] for r in score(hard, data, n=1, rows=('distilled', 'full'), **BRIEF)}
    any, plain = ask(dset, soft=soft), ask(dset, soft=soft, augment='', mix=0.)
    assert [scores[k] for k in ('real_hard', 'syn_hard', 'syn_any', 'random_any', 'syn_plain', 'random_plain')] == [
        classes['full'], classes['distilled'], any['distilled'], any[rand], plain['distilled'], plain[rand]]
    alpha = .5*(scores['syn_any'] - scores['random_any']) - .5*(scores['real_hard'] - scores['syn_hard'])
    assert scores['lrs'] == pytest.approx((2.718281828**alpha - .367879441)/2.350402387)
    assert scores['soft'] == ('own' if own else 'mse')

def test_robust_needs_random_images(data):
    many = make_set(data)
    many = replace(many, pixels=many.pixels.repeat_interleave(15, 0), y=many.y.repeat_interleave(15))
    with pytest.raises(ValueError, match='has 14 of 15 real images; use a smaller set'): robust(many, data, n=1)
    with pytest.raises(ValueError, match='has 14 of 15 real images; use a smaller set'):
        score(many, data, n=1, soft='kl')

# ImageNet's augmentation

def test_zoom_against_torchvision():
    x = torch.randn(40, 1, 32, 32)
    aug = Augment('zoom')
    with seeded(0): params = aug.draw(40, 32)
    for image, fast, m in zip(x, aug(x, params), params['matrix']):
        w, h = (round(side*32) for side in (m[0, 0].item(), m[1, 1].item()))
        left, top = round((m[0, 2].item()*32 + 32 - w)/2), round((m[1, 2].item()*32 + 32 - h)/2)
        slow = resized_crop(image, top, left, h, w, [32, 32], antialias=False)
        inner = slice(1, -1) # edges see their neighbours
        torch.testing.assert_close(fast[:, inner, inner], slow[:, inner, inner], atol=1e-4, rtol=0)

def test_imagenet_looks_at_no_value():
    aug, x = Augment('imagenet'), torch.empty(4, 3, 32, 32, device='meta')
    assert aug(x, aug.draw(4, 32, 'meta')).shape == x.shape

# Networks of one name

class Mine(torch.nn.Module):
    def __init__(self, classes, blind):
        super().__init__()
        self.blind, self.flat, self.fc = blind, torch.nn.Flatten(), torch.nn.Linear(64, classes)
    def forward(self, x): return self.fc(self.flat(x*0 if self.blind else x))

def test_rows_of_a_changed_network_are_trained_again(data, monkeypatch):
    "A network that sees nothing gives one class, whatever a network of its name learned before"
    rows = dict(n=1, rows=('distilled', 'random', 'k-means', 'full'), epochs=0, steps=30)
    dset = replace(make_set(data), evaluation=dict(arch='mine'))
    found = []
    for blind in False, True, False:
        monkeypatch.setitem(ARCHS, 'mine', lambda channels, classes, size, blind=blind: Mine(classes, blind))
        found.append(score(dset, data, **rows))
    seeing, blind, again = map(accs, found)
    assert all(blind[row] == [1/3] for row in blind) and seeing['full'][0] > .6
    assert again == seeing and [r.get('cached', False) for r in found[2]] == [False, True, True, True]
    assert not any(r.get('cached') for r in found[1])

def test_a_set_with_nan_is_not_scored(data, dset):
    "not even if only other rows are asked for"
    dset.pixels[1, 0, 0, 0] = torch.nan
    for rows in ('distilled',), ('random',):
        with pytest.raises(ValueError, match="stored image 1, of class '1', has pixels"):
            score(dset, data, n=1, rows=rows, **BRIEF)
