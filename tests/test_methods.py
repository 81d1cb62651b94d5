"Sampling, starts and losses are no property of a method: each can be asked for in any that looks at real images."
import pytest

from dreamplus.core import toy_images
from dreamplus.distill import distill
from dreamplus.match.experts import train_experts
from dreamplus.recipes import METHODS
from dreamplus.sources import load_data

PATHS = 'mtt', 'tesla'
TINY = dict(ipc=2, width=8, inner=2, batch_real=6, net_batch=8, log=None)
CHANGES = {'representative': dict(sampler='representative'), 'subcluster': dict(sampler='subcluster', subsample=2),
           'start': dict(start='k-means'), 'noise': dict(start='noise'),
           'match': dict(match='gradient + 0.5*embedding'),
           'three': dict(match='0.1*attention + feature + 2*embedding'),
           'both': dict(match='bidirectional', sampler='representative', start='herding')}

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(classes=3, per_class=30, size=16))

@pytest.fixture(scope='module')
def experts(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('experts')
    return dict(experts=str(train_experts(data, out, n=1, epochs=3, width=8, log=None).path), max_start=1, steps=2,
                expert_epochs=1, zca=False)

def moved(data, method, **kw):
    "How far a run of four updates brings the images from where they begin; the same start for the same seed"
    first, last = (distill(data, method, outer=n, **TINY | kw).pixels for n in (1, 3))
    assert last.isfinite().all()
    return (first - last).abs().max().item()

@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize('method', [m for m in METHODS if m not in PATHS])
def test_any_sampler_start_and_loss(data, method, change):
    few = dict(n_data=12) if METHODS[method]['args'].get('n_data', 1) else {}
    assert moved(data, method, **few | change) > 0

@pytest.mark.parametrize('change', [dict(start='k-means'), dict(match='trajectory + 0.5*embedding'),
                                    dict(match='2*trajectory + gradient', sampler='representative')], ids=str)
@pytest.mark.parametrize('method', PATHS)
def test_trajectories_take_a_start_and_another_term(data, experts, method, change):
    assert moved(data, method, **experts | change) > 0

@pytest.mark.parametrize('method, change, reason', [
    ('mtt', dict(sampler='representative'), "at which match='trajectory' does not look"),
    ('dc', dict(warm_epochs=1), 'warm_epochs=1 are on real data'),
    ('dm', dict(subsample=2), "sampler='random' has no centres"),
    ('dsa', dict(match='gradients'), 'is not a sum of gradient, embedding'),
    ('dream+', dict(start='best'), "start='best' is unknown"),
    ('dm', dict(sampler='subcluster', subsample=2, batch_real=5), 'batch_real=5 is not a multiple')])
def test_what_makes_no_sense_is_refused(data, experts, method, change, reason):
    given = TINY | (experts if method == 'mtt' else {}) | change
    with pytest.raises(ValueError, match=reason): distill(data, method, **given)

