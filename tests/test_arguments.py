"Parts of one's own with arguments of their own, wherever a user gives arguments; and what is refused before any work."
from functools import wraps

import pytest
import torch

from dreamplus.arguments import Bounds, Count, Natural, NonNegative, Share
from dreamplus.choose.samplers import SAMPLERS, Sampler, class_table
from dreamplus.cli import main
from dreamplus.core import read_json, toy_images
from dreamplus.data.sources import load_data
from dreamplus.distilled import DistilledSet
from dreamplus.judge.evaluate import check_baselines, evaluate_run, score
from dreamplus.judge.protocols import check_protocol
from dreamplus.judge.scores import cross
from dreamplus.labs import compare as labs_compare
from dreamplus.labs.compare import compare
from dreamplus.labs.plan import plan
from dreamplus.labs.study import study
from dreamplus.loop.distill import distill, make_job
from dreamplus.match.core import MATCHERS, Matcher
from dreamplus.nets.schedules import SCHEDULES, NetworkSchedule
from dreamplus.nets.zoo import create_net
from dreamplus.parts import OPTIMISERS, PixelOptimiser
from dreamplus.recipes import METHODS, Method, recipe
from dreamplus.synthetic import STARTS

MADE = {} # what the parts below were made with

class Waves(Matcher):
    "Differences of the first embedding coordinates"
    def __init__(self, freqs: Count = 64): # Sampled frequencies
        self.freqs = MADE['freqs'] = freqs
    def terms(self, real, syn):
        a, b = (view.embed.mean(1)[:, :self.freqs] for view in (real, syn)) # (C,freqs)
        return dict(waves=(a - b).square().mean(1))

class Skipping(Sampler):
    "The images of each class after the first ones"
    def __init__(self, data, batch_real: Count = 64,
                 skip: Natural = 0): # Images to leave out
        self.data, self.batch_real, self.skip = data, batch_real, skip
        MADE['skip'] = skip
    def __call__(self, net, classes, key=None, fresh=True):
        return class_table(self.data.train, classes.ids)[0][:, self.skip:self.skip + self.batch_real]

def level(data, ipc, key,
          grey: Share = .5): # Of all pixels
    "One grey value"
    MADE['grey'] = grey
    return torch.full((data.n_classes, ipc, *data.train.x.shape[1:]), float(grey))

class Tempered(NetworkSchedule):
    "New networks with other weights"
    def __init__(self, data, make, inner,
                 temper: NonNegative = 1.): # Factor of its weights
        super().__init__(data, make, inner)
        self.temper = MADE['temper'] = temper
    def begin(self, key):
        super().begin(key)
        with torch.no_grad():
            for p in self.net.parameters(): p.mul_(self.temper)

class Adagrad(PixelOptimiser):
    "Steps that become smaller"
    def __init__(self, lr: NonNegative = .1,
                 past: Share = 0.): # Initial squared gradients
        super().__init__()
        self.lr, self.past = lr, past
        MADE['past'] = past
    def make(self, params): return torch.optim.Adagrad(params, initial_accumulator_value=self.past, foreach=False)

CHOICE = dict(match='waves', sampler='skipping', start='level', networks='tempered', optimiser='adagrad')
OWN = dict(freqs=3, skip=2, grey=.25, temper=.5, past=.5) # the arguments of these parts
TINY = dict(width=8, outer=2, inner=2, batch_real=4, norm='instance', augment='')

@pytest.fixture
def parts(monkeypatch):
    "Registers the parts; nothing else knows of them"
    registries = dict(match=MATCHERS, sampler=SAMPLERS, start=STARTS, networks=SCHEDULES, optimiser=OPTIMISERS)
    for (argument, name), part in zip(CHOICE.items(), (Waves, Skipping, level, Tempered, Adagrad)):
        monkeypatch.setitem(registries[argument], name, part)
    monkeypatch.setitem(METHODS, 'waving', Method(base='dm', match='waves'))
    MADE.clear()

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(classes=3, per_class=12, size=8))

def sets(**args): return [word for k, v in args.items() for word in ('--set', f'{k}={v}')]

# Used

def test_in_distill(parts, data):
    dset = distill(data, 'dm', log=None, **TINY, **CHOICE, **OWN)
    assert MADE == OWN
    assert OWN.items() <= dset.provenance['args'].items()

def test_defaults(parts, data):
    distill(data, 'dm', log=None, **TINY, **CHOICE)
    assert MADE == dict(freqs=64, skip=0, grey=.5, temper=1., past=0.)

def test_in_a_weighted_sum(parts, data):
    distill(data, 'dream+', log=None, **TINY, match='0.5*waves + gradient', freqs=3, factor=1, n_data=8)
    assert MADE == dict(freqs=3)

def test_in_plan(parts, data):
    args = TINY | dict(outer=10)
    found = plan(data, 'dm', nets=0, **args, **CHOICE, **OWN)
    assert MADE | dict(grey=.25) == OWN and found # a plan starts no images

def test_in_set_of_distill(parts, tmp_path):
    argv = ['distill', 'digits', '--method', 'dm', '--nets', '0', '--out', str(tmp_path/'run'), '--device', 'cpu']
    assert main(argv + sets(**TINY, **CHOICE, **OWN)) == 0
    assert MADE == OWN

def test_in_set_of_plan(parts, capsys):
    assert main(['plan', 'digits', '--method', 'dm', '--nets', '0', *sets(**TINY, **CHOICE, **OWN)]) == 0
    assert MADE | dict(grey=.25) == OWN

def test_in_compare(parts, data, tmp_path):
    "A method that does not use a part goes without its argument"
    shared = {k: v for k, v in TINY.items() if k != 'outer'} | {k: v for k, v in CHOICE.items() if k != 'match'} | OWN
    records = compare(data, ['waving', 'dm'], (1,), out=tmp_path/'out', steps=2, valid=0, nets=1, rows=('distilled',),
                      training=dict(epochs=1, steps=5), log=None, **shared)
    assert MADE == OWN and len(records) == 2 and not any('failed' in r for r in records)
    args = [read_json(tmp_path/'out'/f'{name}-ipc1-seed0'/'run.json')['args'] for name in ('waving', 'dm')]
    assert args[0]['freqs'] == OWN['freqs'] and 'freqs' not in args[1] and args[1]['skip'] == OWN['skip']

def test_in_set_of_compare(parts, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(labs_compare, 'compare', wraps(compare)(lambda *a, **kw: given.update(kw)))
    for name in 'compare_table', 'compare_figures': monkeypatch.setattr(labs_compare, name, lambda out: '')
    assert main(['compare', '--out', str(tmp_path), *sets(**CHOICE, **OWN)]) == 0
    assert (CHOICE | OWN).items() <= given.items()

@pytest.mark.parametrize('command', ['distill', 'plan', 'compare'])
def test_in_help(parts, capsys, command):
    assert main([command, '--help']) == 0
    lines = [' '.join(line.split()) for line in capsys.readouterr().out.split('\n')]
    for label, line in {"match='waves':": 'freqs=64 Sampled frequencies (a whole number of at least 1)',
                        "sampler='skipping':": 'skip=0 Images to leave out (a whole number of at least 0)',
                        "start='level':": 'grey=0.5 Of all pixels (a number from 0 to 1)',
                        "networks='tempered':": 'temper=1.0 Factor of its weights (a number of at least 0)',
                        "optimiser='adagrad':": 'past=0.0 Initial squared gradients (a number from 0 to 1)'}.items():
        assert line in lines[lines.index(label):]

def test_a_matcher_without_a_source_file(monkeypatch, data, capsys):
    "as one that is typed into a console"
    names = dict(Matcher=Matcher, MADE=MADE)
    exec('class Typed(Matcher):\n'
         '    def __init__(self, rounds: int = 2): MADE["rounds"] = rounds # How often\n'
         '    def terms(self, real, syn): return dict(typed=(real.embed - syn.embed).square().mean((1, 2)))', names)
    monkeypatch.setitem(MATCHERS, 'typed', names['Typed'])
    distill(data, 'dm', ipc=4, log=None, **TINY, match='typed', rounds=5)
    assert MADE['rounds'] == 5
    with pytest.raises(ValueError, match="rounds='x' must be a whole number"):
        recipe('dm', 'digits', match='typed', rounds='x')
    assert main(['distill', '--help']) == 0
    assert 'rounds=2' in capsys.readouterr().out

# Refused

REFUSED = [
    (dict(freqs=0), 'freqs=0 must be a whole number of at least 1'),
    (dict(freqs='many'), "freqs='many' must be a whole number of at least 1"),
    (dict(skip=1.5), 'skip=1.5 must be a whole number of at least 0'),
    (dict(grey=2), 'grey=2 must be a number from 0 to 1'),
    (dict(temper=-1), 'temper=-1 must be a number of at least 0'),
    (dict(past=float('nan')), 'past=nan must be a number from 0 to 1'),
    (dict(frqs=3), "'frqs' is not an argument; did you mean 'freqs'?"),
    (dict(match='wave'), "match='wave' is unknown; did you mean 'waves'?"),
    (dict(match='gradient'), "'freqs' has no effect here: it is an argument of match='waves', which this method does"),
    (dict(sampler='random'), "'skip' has no effect here: it is an argument of sampler='skipping'"),
    (dict(start='noise'), "'grey' has no effect here: it is an argument of start='level'"),
    (dict(networks='real'), "'temper' has no effect here: it is an argument of networks='tempered'"),
    (dict(optimiser='adam'), "'past' has no effect here: it is an argument of optimiser='adagrad'")]

@pytest.mark.parametrize('change, said', REFUSED, ids=[said[:20] for _, said in REFUSED])
def test_refused_before_any_work(parts, data, tmp_path, capsys, change, said):
    args = TINY | CHOICE | OWN | change
    for f in (lambda: distill(data, 'dm', out=tmp_path/'run', log=None, **args), lambda: plan(data, 'dm', **args)):
        with pytest.raises(ValueError) as e: f()
        assert said in str(e.value)
    assert main(['distill', 'digits', '--method', 'dm', '--out', str(tmp_path/'run'), *sets(**args)]) == 2
    assert said in capsys.readouterr().err
    assert not MADE and not (tmp_path/'run').exists()

@pytest.mark.parametrize('change, said', [
    (dict(freqs=0), 'freqs=0 must be a whole number of at least 1'), (dict(match='wave'), "match='wave' is unknown"),
    (dict(frqs=3), "'frqs' is not an argument"), (dict(match='gradient'), "'freqs' has no effect")], ids=str)
def test_compare_refuses_it_too(parts, data, tmp_path, change, said):
    args = {k: v for k, v in (TINY | CHOICE | OWN | change).items() if k != 'outer'}
    with pytest.raises(ValueError) as e: compare(data, ['dm'], (1,), out=tmp_path/'out', steps=2, log=None, **args)
    assert said in str(e.value)
    assert not MADE and not (tmp_path/'out').exists()

def test_arguments_of_two_parts_must_agree(monkeypatch, parts):
    class Other(Waves):
        def __init__(self, batch_real: Count = 8): pass
    monkeypatch.setitem(MATCHERS, 'other', Other)
    with pytest.raises(ValueError, match="batch_real is 8 for match='other' but 64 for networks='real'; rename one"):
        recipe('dm', 'digits', match='other')

def test_an_argument_needs_a_type(monkeypatch):
    class Untyped(Waves):
        def __init__(self, freqs=64): pass
    monkeypatch.setitem(MATCHERS, 'untyped', Untyped)
    with pytest.raises(TypeError, match="Untyped: give 'freqs' a type, as in freqs: int = 1"):
        recipe('dm', 'digits', match='untyped')

def test_what_the_run_does_not_supply(monkeypatch, data):
    class Asking(Waves):
        def __init__(self, moon): pass
    monkeypatch.setitem(MATCHERS, 'asking', Asking)
    with pytest.raises(TypeError, match="Asking needs 'moon', which the run does not supply"):
        distill(data, 'dm', match='asking', log=None)

def test_an_argument_does_not_hide_one_of_distill(monkeypatch, data):
    class Stepping(Waves):
        def __init__(self, steps: Count = 3): pass
    monkeypatch.setitem(MATCHERS, 'stepping', Stepping)
    with pytest.raises(TypeError, match="a part has an argument called 'steps', which `distill` has too"):
        distill(data, 'dm', match='stepping', log=None)

def test_what_the_run_supplies(monkeypatch, data):
    "to matchers, samplers, network schedules and optimisers alike"
    seen = {}
    def asking(kind, part, *args):
        class Asking(part):
            def __init__(self, data, ipc, inner, classes, make, seed):
                seen[kind] = (type(data).__name__, ipc, inner, classes, type(make()).__name__, seed)
                super().__init__(*[dict(data=data, make=make, inner=inner)[a] for a in args])
        return Asking
    for registry, part, *args in ((MATCHERS, Waves), (SAMPLERS, Skipping, 'data'), (OPTIMISERS, Adagrad),
                                  (SCHEDULES, Tempered, 'data', 'make', 'inner')):
        monkeypatch.setitem(registry, 'asking', asking(registry.argument, part, *args))
    asked = dict.fromkeys(('match', 'sampler', 'networks', 'optimiser'), 'asking')
    distill(data, 'dm', 2, seed=5, class_batch=2, width=8, outer=1, inner=2, log=None, **asked)
    assert seen == dict.fromkeys(asked, ('ImageData', 2, 2, 2, 'ConvNet', 5))

@pytest.mark.parametrize('call, says', [
    (lambda d: distill('digits'), 'data must be ImageData, not str; load_data makes one'),
    (lambda d: distill(d, ipc='1'), 'ipc must be int or list, not str'),
    (lambda d: distill(d, out=5), 'out must be str or Path'),
    (lambda d: distill(d, ipc=True), 'ipc must be int'), (lambda d: distill(d, 'dm', log='x'), 'log must be Callable'),
    (lambda d: load_data('digits', size='8'), 'size must be int'),
    (lambda d: recipe('dm', 5), 'data must be str or ImageData'),
    (lambda d: compare(d, 'dm', out='o'), 'methods must be list'), (lambda d: plan(d, nets='x'), 'nets must be int'),
    (lambda d: score(5, d), 'distill makes one'), (lambda d: cross([5], d), 'give a list of DistilledSet'),
    (lambda d: DistilledSet('x', ['a'], [.5], [.2]), 'pixels must be Tensor'), (lambda d: d.select(5), 'class numbers'),
    (lambda d: evaluate_run(5), 'out must be str or Path'), (lambda d: study(d, 'o', seeds=0), 'seeds must be tuple')])
def test_wrong_types_in_python(data, call, says):
    with pytest.raises(TypeError, match=says): call(data)

@pytest.mark.parametrize('change, says', [
    (dict(epochs='x'), "epochs='x' must be a whole number"), (dict(batch=0), 'batch=0 must be'), (dict(lr='x'), 'lr='),
    (dict(mix=5.), 'mix=5.0 must be a number from 0 to 1'), (dict(augment=5), 'augment=5'), (dict(drops=5), 'drops=5')])
def test_wrong_changes_of_a_protocol(change, says):
    with pytest.raises(ValueError, match=says): check_protocol('quick', change)

def test_wrong_values_in_python(data):
    for call, says in ((lambda: distill(data, ipc=1.5), 'ipc=1.5 must be a whole number'),
                       (lambda: plan(data, nets=-1), 'nets=-1'),
                       (lambda: study(data, 'o', seeds=()), 'give at least one seed'),
                       (lambda: data.show(n=0), 'n=0 must be a whole number of at least 1'),
                       (lambda: check_baselines(('random',), 10**20), 'must be from 1 to 10,000'),
                       (lambda: create_net('convnet', 10**20, 3, 8), r'convnet fails for [^\n]*; change it$'),
                       (lambda: load_data('digits', fraction=2), 'fraction=2 must lie')):
        with pytest.raises(ValueError, match=says): call()

def test_a_budget_longer_than_the_recipe(data):
    "has as many outer iterations as it needs; fewer that were asked for are refused"
    outer = lambda **kw: make_job(data, 'idc', 1, None, 0, 'cpu', kw, steps=10**6 + 1)['args']['outer']
    assert outer(inner=100) == outer(inner=100, outer=10_001) == 10_001
    with pytest.raises(ValueError, match='steps=1000001 is more than outer=10000 times inner=100'):
        outer(inner=100, outer=10_000)
    assert make_job(data, 'idc', 1, None, 0, 'cpu', {}, steps=5)['args']['outer'] == recipe('idc', data)['outer']

def test_bounds_are_not_equal_to_other_tuples():
    "In Python 3.11.2, `Annotated[int, Bounds(1)]` is what was made first with anything equal to `Bounds(1)`"
    assert Bounds(1) == Bounds(1) != Bounds(2) and not Bounds(1) == tuple(Bounds(1))
