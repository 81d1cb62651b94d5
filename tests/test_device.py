"The code for a GPU, on a device of the tests' own: nothing stays behind on the CPU, and no step waits for the host."
from functools import partial

import pytest
import torch
from elsewhere import AWAY, Away, Elsewhere
from fastai.callback.core import Callback
from torch import nn

import dreamplus.judge.evaluate
import dreamplus.labs.plan
import dreamplus.loop.distill
import dreamplus.loop.elsewhere
import dreamplus.parts
from dreamplus.core import toy_images
from dreamplus.data.sources import load_data
from dreamplus.distilled import load_distilled
from dreamplus.judge.evaluate import score
from dreamplus.judge.validate import ValidAccuracy
from dreamplus.labs.plan import machine_peak, plan
from dreamplus.loop.distill import distill, resume
from dreamplus.match.core import MATCHERS, Matcher
from dreamplus.match.experts import train_experts

class Weighted(Matcher):
    "A coupled matcher with a parameter and a buffer"
    separable = False
    def __init__(self, data):
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer('target', torch.linspace(-1, 1, data.n_classes))
    def terms(self, real, syn):
        apart = (real.embed - syn.embed.mean(1, True)).mean((1, 2))
        return dict(weighted=(apart - self.scale*self.target[syn.y]).pow(2))

FEW = dict(batch_real=2, interval=10) # rounding would decide between the two images of a small cluster
CASES = {
    'dream+': FEW | dict(factor=2, start='mix', limit=3, warm_epochs=.2),
    'idc': dict(start='noise'),
    'uneven': dict(method='idc', ipc=[1, 2, 1, 3], label_lr=.1, optimiser='adam'),
    'dc': dict(net_epochs=1),
    'dsa, batch norm': dict(method='dsa', norm='batch'),
    'dm': dict(class_batch=3),
    'datadam-code': {}, 'atom': {}, # which read activations
    'herding': dict(method='dream', start='herding', candidates=10, **FEW),
    'resnet': dict(method='dream', match='embedding', arch='resnet10', norm='layer', **FEW),
    'of one\'s own': dict(method='dm', match='weighted'),
}

@pytest.fixture(scope='module')
def data():
    x, y = toy_images(classes=4, per_class=16)
    return load_data((x, y), test=(x, y))

@pytest.fixture(autouse=True)
def there(monkeypatch):
    for module in dreamplus.loop.distill, dreamplus.loop.elsewhere, dreamplus.parts, dreamplus.judge.evaluate:
        monkeypatch.setattr(module, 'pick_device', lambda device=None: torch.device(device or 'cpu'))
    monkeypatch.setitem(MATCHERS, 'weighted', Weighted)

def distilled(data, name, device, inner=3):
    own = dict(method=name, factor=1, width=4, outer=1, inner=inner, report=inner, batch_real=6)
    if 'arch' not in CASES[name]: own |= dict(depth=2)
    few = {} if CASES[name].get('method', name) in ('dc', 'dsa') else dict(n_data=12)
    return distill(data, device=device, log=None, **own | few | dict(lr=.5) | CASES[name])

def test_the_device_is_one():
    with Elsewhere() as device:
        x = torch.arange(3, device=AWAY)
        assert type(x) is Away and not device.waits
        with pytest.raises(RuntimeError, match='another device'): x + torch.arange(3)
        assert x.sum().item() == 3 and (x + 1).cpu().tolist() == [1, 2, 3] and len(device.waits) == 2

@pytest.mark.parametrize('name', CASES)
def test_every_method_runs_there(data, name):
    "with the result of the CPU, but for rounding; the host does not wait more often for more inner iterations"
    waits = []
    for inner in 2, 3:
        with Elsewhere() as device: ours = distilled(data, name, AWAY, inner)
        waits.append(sorted(device.waits))
    assert type(ours.pixels) is torch.Tensor
    torch.testing.assert_close(ours.pixels, distilled(data, name, 'cpu').pixels, rtol=0, atol=1e-3)
    assert waits[0] == waits[1]

@pytest.mark.parametrize('method', ['mtt', 'tesla'])
def test_trajectories_there(data, tmp_path, method):
    with Elsewhere(): train_experts(data.to(AWAY), tmp_path/'experts', 1, epochs=1, batch=16, width=8, log=None)
    own = dict(width=8, experts=str(tmp_path/'experts'), syn_steps=2, expert_epochs=1, max_start=1, outer=2, log=None)
    with Elsewhere(): ours = distill(data, method, device=AWAY, **own)
    torch.testing.assert_close(ours.pixels, distill(data, method, device='cpu', **own).pixels, rtol=0, atol=1e-3)

def test_a_bank_there(data, tmp_path):
    "trained, with its statistics, and used: as on the CPU, and the host waits no more often for more updates"
    def best(device, outer):
        own = dict(width=4, depth=1, factor=1, bank_nets=1, bank_stages='3,6', stat_images=20)
        own |= dict(bank_folder=f'{tmp_path}/{device}')
        return distill(data, 'best', device=device, outer=outer, report=outer, log=None, **own)
    with Elsewhere(): best(AWAY, 2) # which trains the bank
    waits = []
    for outer in 2, 3:
        with Elsewhere() as device: ours = best(AWAY, outer)
        waits.append(sorted(device.waits))
    torch.testing.assert_close(ours.pixels, best('cpu', 3).pixels, rtol=0, atol=1e-3)
    assert waits[0] == waits[1]

class StopCB(Callback):
    def after_batch(self):
        if self.dls.train.at == 3: raise KeyboardInterrupt

@pytest.mark.filterwarnings('ignore:.*to a meta parameter') # torch thinks so
def test_a_run_there(data, tmp_path, monkeypatch):
    "its folder, stopped and resumed; its validation, its table, and a plan before it"
    own = dict(device=AWAY, width=4, depth=1, factor=1, batch_real=6, n_data=12, outer=2, inner=2, report=2)
    short, held = dict(epochs=0, steps=4), data.hold_out(.2)
    table = dict(n=1, rows=('distilled', 'random'), cache=False, **short)
    monkeypatch.setattr(dreamplus.labs.plan, 'machine_peak', partial(machine_peak, n=64)) # a GPU's takes long here
    measured = lambda: dict(metrics=[ValidAccuracy(**short)], log=None)
    with Elsewhere():
        assert plan(held, 'dream+', nets=0, **own)['seconds']['distill'] > 0
        distill(held, 'dream+', out=tmp_path/'whole', **own, **measured())
        with pytest.raises(KeyboardInterrupt):
            distill(held, 'dream+', out=tmp_path/'cut', cbs=[StopCB()], **own, **measured())
        again = resume(tmp_path/'cut', held, **measured())
        rows = score(again, held, device=AWAY, **table)
    assert torch.equal(again.pixels, load_distilled(tmp_path/'whole').pixels)
    assert [r['acc'] for r in rows] == pytest.approx([r['acc'] for r in score(again, held, **table)], abs=.02)
