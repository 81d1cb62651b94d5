"Recipes: those of version 0.1 on every dataset, and methods of one's own that differ in what they state alone."
import gzip
import json

import pytest

from dreamplus.arguments import arguments
from dreamplus.data.datasets import DATASETS
from dreamplus.parts import SELECTORS, all_parts
from dreamplus.recipes import METHODS, Method, published_rows, recipe

NAMES = [*DATASETS, 'cifar10-jpeg', 'flowers'] # and one that no table knows

# Arguments that 0.1 listed and that no part takes now, and when they had no effect
UNUSED = dict(subsample=lambda a: a['sampler'] == 'random',
              raw_features=lambda a: a['sampler'] == 'random' and a['start'] in ('gauss', 'noise'),
              warm_epochs=lambda a: a['networks'] == 'synthetic',
              sampler=lambda a: a['match'] == 'trajectory')
# Arguments that 0.1 did not list, with the values that mean what 0.1 did
ADDED = dict(optimiser='sgd', label_lr=None, class_batch=None, candidates=None, compiled=False, chunk=None, report=None,
             depth=None, stats=None, start_candidates=None, shared_draw=True, lr_schedule='constant')

# Arguments that have another name now
RENAMED = dict(net_on='networks')
# Methods whose definition changed
NEW = {'best'}
# Arguments whose published value 0.1 did not know
CORRECTED = dict(tesla={'lr', 'max_start'})

@pytest.fixture(scope='module')
def before(root):
    "All of (method, dataset, ipc, factor), their arguments in version 0.1, and which of these had no effect"
    with gzip.open(root/'tests'/'recipes-0.1.json.gz', 'rt', encoding='utf-8') as f: old = json.load(f)
    asked = [(ipc, factor) for ipc in old['ipc'] for factor in old['factor']]
    found = []
    new_names = lambda args: {RENAMED.get(k, k): v for k, v in args.items()}
    for name, rows in old['index'].items():
        for (ipc, factor), row in zip(asked, (old['recipes'][i] for i in rows), strict=True):
            args = new_names(old['family'] | row['args'])
            found.append(((*name.split(), ipc, factor), args, [RENAMED.get(k, k) for k in row['idle']]))
    return found

def test_the_fixture_has_every_method_and_dataset(before):
    seen = {(method, dataset) for (method, dataset, *_), _, _ in before}
    assert seen == {(m, d) for m in METHODS for d in NAMES}
    assert len(before) == len(seen)*7*4 # ipc and factor

def test_recipes_are_those_of_version_01(before):
    "Published arguments did not change; what is no longer listed had no effect, and what is new changes nothing"
    wrong = []
    for asked, old, idle in before:
        if asked[0] in NEW: continue
        new = recipe(*asked)
        both = (old.keys() & new.keys()) - CORRECTED.get(asked[0], set())
        wrong += [(asked, k, old[k], new[k]) for k in both if old[k] != new[k]]
        wrong += [(asked, k, old[k], 'left out') for k in old.keys() - new.keys() - {*idle} if not UNUSED[k](old)]
        wrong += [(asked, k, 'not listed', new[k]) for k in new.keys() - old.keys() if new[k] != ADDED[k]]
    assert not wrong

@pytest.mark.parametrize('dataset, ipc, lr', [('cifar10', 1, 500), ('cifar100', 50, 500), ('cifar10', 10, 100)])
def test_tesla_steps_as_its_code(dataset, ipc, lr):
    "The code's pixel gradient is half of the derivative: half of its rate of 1,000 is the same step; else MTT's"
    assert (recipe('tesla', dataset, ipc)['form'], recipe('tesla', dataset, ipc)['lr']) == ('tesla', lr)
    assert recipe('mtt', dataset, ipc)['lr'] == (1000 if ipc == 50 else 100)

# Methods of one's own

@pytest.mark.parametrize('method', METHODS)
def test_a_copy_has_the_same_recipe(monkeypatch, method):
    monkeypatch.setitem(METHODS, 'copy', Method(base=method))
    for name in NAMES:
        for ipc in 1, 10, 50: assert recipe('copy', name, ipc) == recipe(method, name, ipc)

def test_a_method_differs_in_what_it_states(monkeypatch):
    monkeypatch.setitem(METHODS, 'dream++', Method(base='dream+', interval=5))
    for name in NAMES:
        for ipc in 1, 10, 50: assert recipe('dream++', name, ipc) == recipe('dream+', name, ipc) | dict(interval=5)

def test_published_arguments_do_not_override_what_a_method_states(monkeypatch):
    monkeypatch.setitem(METHODS, 'mine', Method(base='dm', augment='color_crop'))
    for name in 'mnist', 'digits', 'svhn':
        assert recipe('mine', name) == recipe('dm', name) | dict(augment='color_crop')
    assert recipe('mine', 'mnist', augment='flip')['augment'] == 'flip' # what the caller gives does

def test_a_misspelt_argument_of_a_method_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, 'mine', Method(base='dream+', intervall=5))
    with pytest.raises(ValueError, match="method='mine' states 'intervall', which is not an argument of any part"):
        recipe('mine', 'digits')

def test_an_unknown_base_is_refused():
    with pytest.raises(ValueError, match="method='dreem' is unknown; did you mean 'dream'?"): Method(base='dreem')

def test_published_arguments_are_arguments_of_parts():
    known = {name for part in all_parts().values() for name in arguments(part)} | {*SELECTORS}
    assert not {name for rows in published_rows().values() for row in rows for name in row['args'] if name not in known}
