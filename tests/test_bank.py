"Network banks and class statistics: what they depend on, how they are made, and what draws from them."
import copy

import pytest
import torch
from filelock import FileLock, Timeout
from torch.nn import functional as F

from dreamplus.arguments import build
from dreamplus.core import Key, load_state, read_json, save_state, seeded, toy_images, write_json
from dreamplus.data.core import to_float
from dreamplus.data.sources import load_data
from dreamplus.judge.evaluate import evaluate_run
from dreamplus.labs.plan import plan
from dreamplus.loop.distill import distill, distiller, resume
from dreamplus.match import statistics
from dreamplus.match.core import View, make_matcher
from dreamplus.match.statistics import StatisticsMatcher, TeachMatcher, bank_statistics, class_statistics, waves
from dreamplus.nets.augment import Augment
from dreamplus.loop.callbacks import LoopCB
from dreamplus.nets.bank import Bank, BankTraining, all_banks, network_bank
from dreamplus.nets.facts import network_facts
from dreamplus.nets.zoo import ARCHS, network
from dreamplus.parts import OPTIMISERS
from dreamplus.recipes import recipe
from dreamplus.synthetic import check_start

HOW = BankTraining(16, bank_augment='crop')
TINY = dict(ipc=1, width=8, outer=4, log=None, factor=1, bank_nets=2, bank_stages='4,8',
            bank_augment='crop', stat_images=20)

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(classes=3, per_class=30), test=toy_images(classes=3, seed=1))

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv('DREAMPLUS_CACHE', str(tmp_path/'cache'))

@pytest.fixture(scope='module')
def bank(data, tmp_path_factory):
    return network_bank(data, network(data, width=8), HOW, None, str(tmp_path_factory.mktemp('bank')), 2, '5,20')

def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])
def same(a, b): return len(a) == len(b) and all(torch.equal(weights(m), weights(n)) for m, n in zip(a.nets, b.nets))

# How a bank is made

def test_training_that_was_stopped_goes_on_to_the_same_weights(data, bank, tmp_path):
    class Stop(Exception): pass
    def stop(line): raise Stop
    make, where = network(data, width=8), str(tmp_path/'stopped')
    for _ in range(3): # each time after another stage
        with pytest.raises(Stop): network_bank(data, make, HOW, stop, where, 2, '5,20')
    assert same(network_bank(data, make, HOW, None, where, 2, '5,20'), bank)

def test_held_out_and_test_images_are_not_looked_at(data, tmp_path):
    held = data.hold_out(.2)
    other = copy.copy(held)
    other.test, other.valid = (copy.copy(part) for part in (held.test, held.valid))
    other.test.x, other.valid.x = 255 - other.test.x, 255 - other.valid.x
    a, b = (network_bank(d, network(d, width=8), HOW, None, str(tmp_path/name), 1, '6')
            for name, d in dict(a=held, b=other).items())
    assert same(a, b)

def test_the_second_run_pays_nothing(data):
    def spent(**change): # lines of trainings and statistics
        said = []
        distill(data, 'best', **TINY | dict(log=said.append) | change)
        return sum(line.startswith(('network bank', 'class statistics')) for line in said)
    first, second, another = spent(), spent(ipc=2, seed=1), spent(bank_lr=.02)
    assert second == 0 and len(all_banks()) == 2 # another learning rate is another bank
    assert first == another == 8 # 2 networks of 2 stages, and the statistics of each

def test_another_network_of_the_same_name_is_another_bank(data, monkeypatch):
    class Net(torch.nn.Sequential):
        def __init__(self, channels, classes, size):
            super().__init__(torch.nn.Flatten(), torch.nn.Linear(channels*size**2, 6), torch.nn.ReLU(),
                             torch.nn.Linear(6, classes))
    first = Net
    class Net(first):
        def forward(self, x): return super().forward(-x)
    for arch in first, Net:
        monkeypatch.setitem(ARCHS, 'mine', arch)
        distill(data, 'best', **{k: v for k, v in TINY.items() if k != 'width'}, arch='mine')
    assert len(all_banks()) == 2

@pytest.mark.parametrize('change, said', [
    (dict(bank_stages='5,.5'), "bank_stages='5,.5' must be steps"), (dict(bank_stages='.999'), 'ask for less'),
    (dict(bank_folder=__file__ + '/inside'), 'is a file, or in one; give a folder'),
    (dict(bank_nets=0),
     'bank_nets=0 must be a whole number of at least 1'), (dict(bank_augment='blur'), "asks for 'blur'"),
    (dict(match='statistics', networks='real'), "use networks='bank'"),
    (dict(match='gradient', shared_draw=False), 'matchers without real images; use shared_draw=True'),
    (dict(networks='real', match='gradient', bank_lr=.1),
     "'bank_lr' has no effect here: it is an argument of the training of the bank")])
def test_errors(data, monkeypatch, change, said):
    monkeypatch.setattr('dreamplus.nets.bank.MOST_STEPS', 50)
    args = TINY | dict(bank_lr=1e-9) if 'ask' in said else TINY # which never learns
    if change.get('networks') == 'real': args = dict(ipc=1, log=None)
    if 'match' in change: args = {k: v for k, v in args.items() if k != 'stat_images'}
    with pytest.raises(ValueError) as e: distill(data, 'best', **args | change)
    assert said in str(e.value)

def test_a_folder_that_is_taken_is_refused_before_the_bank_is_trained(data, tmp_path):
    (tmp_path/'notes').write_text('mine')
    with pytest.raises(ValueError, match='files that are not of a run'): distill(data, 'best', out=tmp_path, **TINY)
    for change in dict(eval_augment='blur'), dict(augment='blur'):
        with pytest.raises(ValueError, match="asks for 'blur'"): distill(data, 'best', **TINY | change)
    assert not all_banks()

def test_stages_of_two_kinds_do_not_mix(data, bank, tmp_path):
    make, where = network(data, width=8), str(tmp_path/'both')
    network_bank(data, make, HOW, None, where, 1, '.6,.8')
    mixed = network_bank(data, make, HOW, None, where, 1, '5,20')
    assert [torch.equal(weights(a), weights(b)) for a, b in zip(mixed.nets, bank.nets)] == [True]*2

@pytest.mark.parametrize('name', ['net000-4.json', 'net001-8.safetensors', 'net000-8-statistics'])
def test_a_damaged_file_is_named_or_trained_again(data, tmp_path, name):
    args = TINY | dict(bank_folder=str(tmp_path/'bank'))
    whole = distill(data, 'best', **args)
    [file] = (tmp_path/'bank').glob(f'{name}*')
    file.write_bytes(file.read_bytes()[:40])
    if 'statistics' not in name:
        says = f'{name} is (damaged|not JSON).*; remove it, and it is trained again'
        with pytest.raises(ValueError, match=says): distill(data, 'best', **args)
        file.unlink()
    assert torch.equal(distill(data, 'best', **args).pixels, whole.pixels)

def test_a_killed_beginning_is_no_obstacle_and_other_files_are(data, tmp_path):
    make = network(data, width=8)
    (tmp_path/'.lock').touch(), (tmp_path/'.dreamplus-0a1b2c3d.tmp').mkdir()
    network_bank(data, make, HOW, None, str(tmp_path), 1, '2')
    (tmp_path/'other').mkdir(), (tmp_path/'other'/'notes').touch()
    with pytest.raises(ValueError, match='holds other files'):
        network_bank(data, make, HOW, None, str(tmp_path/'other'), 1, '2')

@pytest.mark.parametrize('change, said', [(dict(match='gradient', batch_real=4), 'shared_draw=False is for matchers'),
                                          (dict(match='statistics + trajectory'), 'experts=None')], ids=str)
def test_what_cannot_run_is_refused_before_the_bank_is_trained(data, change, said):
    args = {k: v for k, v in TINY.items() if k != 'stat_images' or 'statistics' in change['match']}
    with pytest.raises(ValueError, match=said): distill(data, 'best', **args | change)
    assert not all_banks()

def test_networks_that_diverge_are_not_kept(data):
    with pytest.raises(ValueError, match='diverges at bank_lr=10000000000.0; use a smaller one'):
        distill(data, 'best', **TINY | dict(bank_lr=1e10))
    assert not [m for b in all_banks() for m in b.members]

def test_attributes_and_helpers_are_part_of_a_network():
    class Scaled(torch.nn.Linear):
        def __init__(self, scale, act):
            super().__init__(2, 2)
            self.scale, self.act = scale, act
        def forward(self, x): return self.act(super().forward(x)*self.scale)
    def relu(x): return x.relu()
    def tanh(x): return x.tanh()
    def facts(*args):
        with seeded(0): return network_facts(Scaled(*args))['code']
    facts = [facts(*args) for args in ((1., relu), (1., relu), (2., relu), (1., tanh))]
    assert facts[0] == facts[1] and len({*facts}) == 3

def test_changed_weights_are_not_resumed_from(data, tmp_path):
    args = TINY | dict(bank_folder=str(tmp_path/'bank'), outer=6, report=1)
    class Stop(Exception): pass
    class StopCB(LoopCB):
        order = 200
        def after_epoch(self):
            if self.dls.train.at >= 3: raise Stop('here')
    with pytest.raises(Stop): distill(data, 'best', out=tmp_path/'run', cbs=[StopCB()], **args)
    file = tmp_path/'bank'/'net000-4.safetensors'
    state = load_state(file)
    save_state(file, state | dict(net={k: 1.5*v for k, v in state['net'].items()}))
    with pytest.raises(ValueError, match='have changed since the run began'): resume(tmp_path/'run', data, log=None)
    out, said = tmp_path/'run'/'run.json', []
    write_json(out, read_json(out) | dict(threads=99)) # on another machine, the same training gives other weights
    assert resume(tmp_path/'run', data, log=said.append).provenance['steps'] == 6
    assert any('threads: 99 then' in line for line in said)

# Statistics

@pytest.mark.parametrize('statistic, numbers', [
    ('embedding', lambda net, x: [net.embed(x)]), ('blocks', lambda net, x: [f.flatten(1) for f in net.features(x)]),
    ('squares', lambda net, x: [net.embed(x), net.embed(x)**2])])
def test_statistics_equal_a_loop_over_classes(data, bank, statistic, numbers):
    net, train = bank.nets[3], data.train
    found = class_statistics(net, data, Augment(''), 30, Key(0), statistic=statistic)
    with torch.no_grad(): each = [numbers(net, data.normalize(to_float(x))) for x in train.x.split(train.counts)]
    for part, classes in zip(found, zip(*each), strict=True):
        torch.testing.assert_close(part['mean'], torch.stack([e.mean(0) for e in classes]))
        within = torch.stack([(e - e.mean(0)).pow(2).sum(1).mean() for e in classes]).mean()
        torch.testing.assert_close(part['within'], within, rtol=1e-4, atol=0)

def test_waves_tell_directions(data, bank):
    x = data.normalize(to_float(data.test.x[:12])).unflatten(0, (3, 4))
    [near], [other] = (waves(View(bank.nets[3], x[i:i + 1, :1], torch.zeros(1))) for i in (0, 1))
    assert near.shape == (1, 1, 1024) and not torch.allclose(near, other, atol=.1)
    e = bank.nets[3].embed(x[0, :1])
    angles = 2*F.normalize(e, dim=1)@Key(0, 'waves').randn(e.shape[1], 512)
    torch.testing.assert_close(near[0], torch.cat([angles.cos(), angles.sin()], 1))

def test_statistics_do_not_depend_on_the_batch(data, bank):
    under = lambda batch: class_statistics(bank.nets[0], data, Augment('color_crop'), 40, Key(3), batch)
    [one], [other] = under(500), under(7)
    for k in one: torch.testing.assert_close(one[k], other[k], rtol=1e-4, atol=1e-5)

def test_statistics_are_kept_for_each_augmentation(data, bank):
    a, b, again = (bank_statistics(bank, data, Augment(ops), 20) for ops in ('crop', 'color', 'crop'))
    means = [found[0][0]['mean'] for found in (a, b, again)]
    assert torch.equal(means[0], means[2]) and not torch.equal(means[0], means[1])
    assert len(bank_statistics(bank, data, Augment('crop'), 20, statistic='squares')[0]) == 2

def test_statistics_are_written_under_the_lock_of_the_bank(data, bank, monkeypatch):
    "which an extension of the bank takes before it removes the files of killed writers"
    seen, save = [], statistics.save_state
    def saving(file, made):
        with pytest.raises(Timeout): FileLock(bank.path/'.lock', timeout=0).acquire()
        seen.append(file)
        save(file, made)
    monkeypatch.setattr(statistics, 'save_state', saving)
    bank_statistics(bank, data, Augment('flip'), 7)
    assert len(seen) == len(bank)

def test_a_loss_of_one_class_is_that_of_all(data, bank):
    match = StatisticsMatcher(data, bank, Augment(''), None, 20) + .3*TeachMatcher(bank, 'last')
    x, y = torch.randn(3, 4, 1, 8, 8), torch.tensor([2, 0, 1])
    whole = match(None, View(bank.nets[0], x, y))
    for c in range(3):
        torch.testing.assert_close(match(None, View(bank.nets[0], x[c:c + 1], y[c:c + 1])), whole[c:c + 1])

@pytest.mark.parametrize('statistic, function', [('embedding', lambda e: [e]), ('squares', lambda e: [e, e**2])])
def test_the_gradient_is_that_of_the_formula(data, bank, statistic, function):
    known = bank_statistics(bank, data, Augment(''), 20, statistic=statistic)[1]
    x, y = torch.randn(3, 4, 1, 8, 8, requires_grad=True), torch.arange(3)
    net, match = bank.nets[1], StatisticsMatcher(data, bank, Augment(''), None, 20, statistic) + .5*TeachMatcher(bank)
    slow = 0
    for c in range(3):
        for e, k in zip(function(net.embed(x[c])), known, strict=True):
            slow = slow + (e.mean(0) - k['mean'][c]).pow(2).sum()/k['within']/len(known)
        slow = slow + .5*F.cross_entropy(net(x[c]), torch.full((4,), c))
    ours = match(None, View(net, x, y)).sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, slow)))

# Runs

@pytest.mark.parametrize('method, change', [
    ('best', {}), ('best', dict(match='statistics', class_batch=2)), ('best', dict(teacher='next', ipc=[1, 2, 1])),
    ('best', dict(label_lr=.1)), ('best', dict(norm='batch')), ('best', dict(optimiser='adamw', pixel_wd=.01)),
    ('dream+', dict(networks='bank', match='bidirectional + 0.02*teach')), ('dm', dict(networks='bank')),
    ('best', dict(match='embedding + teach', shared_draw=True))], ids=str)
def test_what_draws_from_a_bank(data, method, change):
    looks = method == 'best' and 'statistics' in change.get('match', 'statistics')
    own = {k: v for k, v in TINY.items() if looks or k != 'stat_images'}
    if method != 'best': own |= dict(batch_real=8) | (dict(inner=2) if method == 'dream+' else {})
    learn = distiller(data, method, **{k: v for k, v in (own | change).items() if k != 'log'})
    before = learn.model.pixels.detach().clone()
    with learn.no_bar(): learn.fit(learn.dls.train.epochs)
    now = learn.model.pixels.detach()
    assert now.isfinite().all() and not torch.equal(now, before)

def test_chunks_change_nothing_but_rounding(data):
    pixels = [distill(data, 'best', **TINY | dict(ipc=2, chunk=chunk)).pixels for chunk in (0, 1)]
    torch.testing.assert_close(*pixels, rtol=0, atol=1e-4)

def test_a_stopped_run_goes_on_to_the_same_bits(data, tmp_path):
    class Stop(Exception): pass
    class StopCB(LoopCB):
        order = 200
        def after_epoch(self):
            if self.dls.train.at >= 3: raise Stop('here')
    args = TINY | dict(outer=6, report=1)
    whole = distill(data, 'best', **args)
    with pytest.raises(Stop): distill(data, 'best', out=tmp_path/'run', cbs=[StopCB()], **args)
    info = read_json(tmp_path/'run'/'run.json')
    assert info['bank_seconds'] > 0
    write_json(tmp_path/'run'/'run.json', info | dict(bank_seconds=12.)) # so long that it is not rounded
    rest = resume(tmp_path/'run', data, log=None)
    assert torch.equal(rest.pixels, whole.pixels) and 12 <= rest.provenance['bank']['seconds'] < 15
    assert load_state(tmp_path/'run'/'checkpoint'/'state.safetensors')['at'] == 6

def test_a_plan_counts_a_later_teacher_and_the_candidates(data, monkeypatch):
    "The teacher costs one more pass over the images, except where the network is the last of its stages itself"
    monkeypatch.setattr('dreamplus.labs.plan.machine_peak', lambda device: 1e9)
    def parts(**change):
        made = plan(data, 'best', nets=0, **{k: v for k, v in (TINY | change).items() if k != 'log'})
        return {r['part']: r['flops'] for r in made['parts']}
    usual, later = parts(start_candidates=4, teacher='same'), parts(start_candidates=None, teacher='last')
    assert 'matching: teacher' not in usual
    assert later['matching: teacher'] == pytest.approx(usual['matching']/2, rel=.05) # two stages
    assert usual['start'] < .4*later['start'] # 4 of 21 images of a class

def test_a_batch_of_one_is_refused_before_training(data):
    args = TINY | dict(arch='resnet10', norm='batch', ipc=2, bank_batch=1)
    with pytest.raises(ValueError, match='bank_batch=1 gives a batch norm of this network a single value'):
        distill(data, 'best', **args)
    assert not [m for b in all_banks() for m in b.members]

def test_the_result_counts_the_seconds_of_the_bank_separately(data, tmp_path):
    for name in 'first', 'second':
        dset = distill(data, 'best', out=tmp_path/name, **TINY)
        result = evaluate_run(tmp_path/name, data, n=1, rows=('distilled',), epochs=0, steps=2)
        assert result['seconds']['bank'] == dset.provenance['bank']['seconds']
        assert result['seconds']['bank_trained'] == dset.provenance['bank']['trained']
    assert dset.provenance['bank']['stages'] == [4, 8] and dset.provenance['bank']['nets'] == 2

# pixels, images of the smallest class, images per class, factor
FACTORS = [(32, 16, 1, 4), (32, 15, 1, 2), (32, 3, 1, 1), (32, 16, 2, 2), (28, 40, 1, 2), (16, 40, 1, 2),
           (15, 40, 1, 1), (96, 18, 2, 3)]

@pytest.mark.parametrize(('size', 'least', 'ipc', 'factor'), FACTORS)
def test_best_knows_the_size_and_the_number_of_images(size, least, ipc, factor):
    "On unknown data: no decoded image is smaller than 8 pixels, and the real images suffice for the start"
    split = torch.zeros(2*least + 1, 1, size, size), torch.arange(2*least + 1) // (least + 1)
    data = load_data(split, test=split)
    args = recipe('best', data, ipc)
    assert args['factor'] == factor
    check_start(data, ipc, factor, args['start'])

def test_the_published_weight_follows_the_images_per_class():
    weights = [recipe('best', 'cifar10', ipc)['match'] for ipc in (1, 10)]
    assert weights == ['statistics + 0.15*teach', 'statistics + 0.02*teach']
    args = recipe('best', 'mnist', 1)
    assert args['augment'] == args['bank_augment'] == 'color_crop_scale_rotate' # digits are not mirrored

def test_adamw_is_that_of_torch():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    ours = build(OPTIMISERS['adamw'], dict(lr=.1, pixel_wd=.2)).opt_func([[a]], [.1])
    theirs = torch.optim.AdamW([b], .1, (.9, .99), weight_decay=.2)
    for _ in range(3):
        for p, opt in ((a, ours), (b, theirs)):
            p.grad = torch.tensor([1., -2.])
            opt.step()
    assert torch.equal(a, b)

def test_a_matcher_needs_to_know_its_bank(data, bank):
    supplied = dict(data=data, view_augment=Augment(''), log=None)
    assert len(Bank(bank.path)) == 4
    made = make_matcher('statistics + 0.1*teach', dict(stat_images=10, teacher='next'), bank=bank, **supplied)
    assert not made.needs_real and not made.backward
    with pytest.raises(ValueError, match='needs several stages'):
        make_matcher('teach', dict(teacher='next'), bank=None, **supplied)
