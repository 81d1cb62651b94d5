"The code for a GPU, on a device of the tests' own: nothing stays behind on the CPU, and no step waits for the host."
import pytest
import torch
from elsewhere import AWAY, Away, Elsewhere
from fastai.callback.core import Callback

import dreamplus.loop.distill
import dreamplus.judge.evaluate
from dreamplus.core import toy_images
from dreamplus.loop.distill import distill, resume
from dreamplus.distilled import load_distilled
from dreamplus.judge.evaluate import score
from dreamplus.match.experts import train_experts
from dreamplus.labs.plan import plan
from dreamplus.data.sources import load_data

CASES = {
    'dream+': dict(batch_real=8, n_data=16, warm_epochs=.2, interval=10),
    'dream+, factor 2': dict(method='dream+', factor=2, start='mix', batch_real=8, n_data=16, interval=10),
    'idc': dict(batch_real=8, n_data=16, start='noise'),
    'dc': dict(batch_real=8, net_epochs=1),
    'dsa, batch norm': dict(method='dsa', norm='batch', batch_real=8),
    'dm': dict(batch_real=8),
    'datadam': dict(batch_real=8),
    'datadam-code': dict(batch_real=8),
    'atom': dict(batch_real=8),
    'herding': dict(method='dream', start='herding', batch_real=8, n_data=16, interval=10),
    'candidates': dict(method='dream', candidates=10, batch_real=8, n_data=16, interval=10),
    'resnet': dict(method='dream', arch='resnet10', norm='layer', batch_real=8, n_data=16, interval=10),
}

@pytest.fixture(scope='module')
def data():
    x, y = toy_images(classes=5, per_class=20)
    return load_data((x, y), test=(x, y))

@pytest.fixture(autouse=True)
def there(monkeypatch):
    for module in dreamplus.loop.distill, dreamplus.judge.evaluate:
        monkeypatch.setattr(module, 'pick_device', lambda device=None: torch.device(device or 'cpu'))

def distilled(data, name, device, **kw):
    own = dict(method=name, factor=1, width=8, outer=2, inner=3)
    return distill(data, device=device, log=None, **own | CASES[name] | kw)

def test_the_device_is_one():
    with Elsewhere() as device:
        x = torch.arange(3, device=AWAY)
        assert type(x) is Away and not device.waits
        with pytest.raises(RuntimeError, match='another device'): x + torch.arange(3)
        assert x.sum().item() == 3 and (x + 1).cpu().tolist() == [1, 2, 3] and len(device.waits) == 2

@pytest.mark.parametrize('name', CASES)
def test_every_method_runs_there(data, name):
    "with the result of the CPU, but for rounding"
    with Elsewhere(): ours = distilled(data, name, AWAY)
    expected = distilled(data, name, 'cpu')
    assert type(ours.pixels) is torch.Tensor
    torch.testing.assert_close(ours.pixels, expected.pixels, rtol=0, atol=1e-3)

@pytest.mark.parametrize('name', CASES)
def test_no_step_waits_for_the_host(data, name):
    "A run with thrice the steps, and as many reports and choices, has it wait no more often"
    waits = []
    for inner in 2, 6:
        with Elsewhere() as device: distilled(data, name, AWAY, outer=1, inner=inner, report=inner)
        waits.append(sorted(device.waits))
    assert waits[0] == waits[1]

@pytest.mark.parametrize('method', ['mtt', 'tesla'])
def test_trajectories_there(data, tmp_path, method):
    with Elsewhere(): train_experts(data.to(AWAY), tmp_path/'experts', 1, epochs=2, batch=16, width=8, log=None)
    own = dict(width=8, experts=str(tmp_path/'experts'), syn_steps=2, expert_epochs=1, max_start=1, outer=3, log=None)
    with Elsewhere(): ours = distill(data, method, device=AWAY, **own)
    torch.testing.assert_close(ours.pixels, distill(data, method, device='cpu', **own).pixels, rtol=0, atol=1e-3)

class StopCB(Callback):
    def after_batch(self):
        if self.dls.at == 3: raise KeyboardInterrupt

@pytest.mark.filterwarnings('ignore:.*to a meta parameter') # torch thinks so
def test_a_run_there(data, tmp_path):
    "its folder, stopped and resumed; its table, and a plan before it"
    own = dict(device=AWAY, width=8, factor=1, batch_real=8, n_data=16, outer=2, inner=2)
    table = dict(n=1, rows=('distilled', 'random'), cache=False, epochs=0, steps=20)
    with Elsewhere():
        assert plan(data, nets=0, **own)['seconds']['distill'] > 0
        distill(data, out=tmp_path/'whole', log=None, **own)
        with pytest.raises(KeyboardInterrupt): distill(data, out=tmp_path/'cut', cbs=[StopCB()], log=None, **own)
        again = resume(tmp_path/'cut', data, log=None)
        rows = score(again, data, device=AWAY, **table)
    assert torch.equal(again.pixels, load_distilled(tmp_path/'whole').pixels)
    assert [r['acc'] for r in rows] == pytest.approx([r['acc'] for r in score(again, data, **table)], abs=.02)
