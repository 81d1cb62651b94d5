"Every part of fastai that `nbs/66_loop.distill.ipynb` lists works on the Learner of a distillation."
import gc
import re
import sys
from types import ModuleType, SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner, Recorder, load_learner
from fastprogress.fastprogress import ConsoleMasterBar
from notebooks import NBS, Notebook

from dreamplus.core import toy_images
from dreamplus.data.sources import load_data
from dreamplus.data.whiten import precondition
from dreamplus.distilled import load_distilled
from dreamplus.judge.validate import ValidAccuracy
from dreamplus.loop.distill import distill, distiller
from dreamplus.loop.report import read_history

SMALL = dict(outer=4, inner=2, report=2, width=8, factor=1, batch_real=4, n_data=8, net_batch=8, interval=2, net_mix=0.)

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(classes=3, per_class=20, size=8)).hold_out(.25)

@pytest.fixture
def make(data, tmp_path):
    "A Learner of 8 inner iterations with a report after every 2"
    def learner(method='dream', *cbs, **kw):
        args = {k: v for k, v in SMALL.items() if method == 'dream' or k != 'interval'}
        learn = distiller(data, method, cbs=cbs, **args | kw)
        learn.path = tmp_path
        return learn
    return learner

def pixels(learn): return learn.model.pixels.detach().clone()

class Scripted(ValidAccuracy):
    "Measures these accuracies, one after the other"
    def __init__(self, *accs):
        super().__init__()
        self.script = iter(accs)
    def measure(self, learn, seed=0): return 1., next(self.script)

class KeepCB(Callback):
    "Pixels and learning rate after each epoch"
    order = 52 # before trackers
    def __init__(self): self.kept, self.lrs = [], []
    def after_epoch(self):
        self.kept.append(pixels(self.learn))
        self.lrs.append(self.opt.hypers[0]['lr'])

@pytest.mark.parametrize('budget, reports', [
    ({}, 20), (dict(steps=40), 10), (dict(steps=7), 7), (dict(steps=40, report=8), 5)])
def test_number_of_reports(data, budget, reports):
    rows = []
    class CountCB(Callback):
        def after_epoch(self): rows.append(self.dls.train.at)
    args = {k: v for k, v in SMALL.items() if k not in ('interval', 'report', 'outer', 'n_data')}
    distill(data, 'dsa', 1, outer=40, cbs=[CountCB()], log=None, **args, **budget)
    assert len(rows) == reports and rows[-1] == budget.get('steps', 80)

def test_the_whole_list_is_tested():
    cells = Notebook(NBS/'66_loop.distill.ipynb').prose
    listed = next(c for c in cells if '`ProgressCallback`' in c)
    names = {re.split(r'[.(=]', text.removeprefix('learn.'))[0] for text in re.findall(r'`([^`]+)`', listed)}
    with open(__file__, encoding='utf-8') as f: code = re.sub(r'^(from|import) .*$', '', f.read(), flags=re.M)
    assert {n for n in names if not re.search(rf'\b{n}\b', code)} <= {'tests/test_callbacks'}

# Display

def test_progress_callback(make, capsys):
    learn = make('dream', ProgressCallback())
    learn.fit(2)
    shown = capsys.readouterr().out
    assert 'train_loss' in shown and 'Epoch 2/2' in shown and learn.dls.train.at == 4

@pytest.mark.parametrize('metrics', [(), [Scripted(.1, .2)]], ids=['', 'metrics'])
def test_show_graph(make, monkeypatch, metrics):
    drawn = []
    monkeypatch.setattr(ConsoleMasterBar, 'update_graph', lambda bar, graphs, *bounds: drawn.append((graphs, bounds)))
    make('dream', ProgressCallback(), ShowGraphCallback(), metrics=metrics).fit(2)
    (losses, valid), (x, y) = drawn[-1]
    assert len(losses[1]) == 4 and len(valid[1]) == 2 and x == (0, 4) and y[1] == max(losses[1])

def test_display_in_distill(data, tmp_path, capsys):
    cbs = [ProgressCallback(), ShowGraphCallback(), CSVLogger('log.csv')]
    distill(data, 'dream', out=tmp_path/'run', cbs=cbs, log=None, **SMALL)
    assert 'Epoch 4/4' in capsys.readouterr().out
    assert (tmp_path/'run'/'log.csv').read_text().startswith('epoch,train_loss,valid_loss,time\n0,')

def test_csv_logger(make):
    learn = make('dream', CSVLogger('log.csv'), metrics=[Scripted(.1, .2)])
    learn.fit(2)
    log = learn.csv_logger.read_log()
    assert [*log.columns] == ['epoch', 'train_loss', 'valid_loss', 'valid_acc', 'time']
    assert log.valid_acc.tolist() == [.1, .2]

def test_recorder(make):
    learn = make('dream', metrics=[Scripted(.1, .2)])
    learn.fit(2)
    r = learn.recorder
    assert isinstance(r, Recorder) and [*r.metric_names] == ['epoch', 'train_loss', 'valid_loss', 'valid_acc', 'time']
    assert len(r.losses) == len(r.lrs) == 4 and [*r.iters] == [2, 4] and [v[2] for v in r.values] == [.1, .2]
    assert [v[0] for v in r.values] == [r.losses[1], r.losses[3]]
    assert len(learn.final_record) == 3

class CountTensors(Callback):
    "Tensors that live after each batch"
    order, alive = 90, ()
    def after_batch(self): self.alive = *self.alive, sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

@pytest.mark.parametrize('method, own', [
    ('dream', SMALL | dict(outer=1, inner=8, interval=8)),
    ('best', dict(outer=8, width=8, bank_nets=1, bank_stages='1'))])
def test_no_batch_leaves_a_tensor(data, method, own):
    "Kept between large tensors, small ones divide the free memory, and the process grows with each batch"
    watch = CountTensors()
    gc.collect()
    gc.disable() # what other tests left is not collected between two batches
    try: distill(data, method, cbs=[watch], log=None, **own | dict(report=4))
    finally: gc.enable()
    assert len(watch.alive) == 8 and len({*watch.alive[2:]}) == 1, watch.alive

@pytest.mark.parametrize('metrics', [(), [Scripted(.1, .2)]], ids=['', 'metrics'])
def test_plot_loss(make, metrics):
    learn = make(metrics=metrics)
    learn.fit(2)
    ax = learn.recorder.plot_loss(skip_start=0, show_epochs=True, ax=plt.figure().subplots())
    assert len(ax.lines[0].get_xdata()) == 4

def test_summary(make):
    text = str(make('dream', label_lr=.1).summary())
    assert 'SyntheticSet' in text and 'Callbacks:' in text and 'SampleCB' in text

@pytest.mark.parametrize('kw', [{}, dict(ipc=[1, 3, 2], factor=2, start='noise'), dict(label_lr=.1)], ids=str)
def test_show_results(make, kw):
    plt.close('all')
    make('dream', **kw).show_results(max_n=4)
    axes = [ax for ax in plt.gcf().axes if ax.images]
    assert [ax.get_title() for ax in axes] == (['0', '1', '2'] if kw.get('factor') != 2 else ['0']*4)

# Logging

class Writer:
    "In place of TensorBoard's"
    def __init__(self, log_dir): self.scalars, self.figures, self.graph, self.open = {}, [], None, True
    def add_graph(self, model, *xb): self.graph = torch.jit.trace(model, xb)
    def add_scalar(self, name, value, step): self.scalars.setdefault(name, []).append(float(value))
    def add_figure(self, name, figure, step): self.figures.append(len(figure.axes))
    def close(self): self.open = False

@pytest.mark.parametrize('kw', [{}, dict(label_lr=.1)], ids=str)
def test_tensorboard(make, monkeypatch, kw):
    for name in 'tensorboard', 'torch.utils.tensorboard': monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules['torch.utils.tensorboard'].SummaryWriter = Writer
    from fastai.callback import tensorboard
    monkeypatch.setattr(tensorboard, 'SummaryWriter', Writer)
    learn = make('dream', tensorboard.TensorBoardCallback('log'), metrics=[Scripted(.1, .1, .2, .2)], **kw)
    learn.fit(2)
    writer = learn.tensor_board.writer
    assert len(writer.scalars['train_loss']) >= 4 and writer.scalars['valid_acc'] == [.1, .2]
    assert writer.figures == [3, 3] and writer.graph is not None and not writer.open

def test_wandb(make, monkeypatch):
    logged = {}
    def log(values, step=None): logged.update({k: [*logged.get(k, []), v] for k, v in values.items()})
    fake = ModuleType('wandb')
    fake.run, fake.log = SimpleNamespace(step=0, summary={}), log
    fake.config = SimpleNamespace(update=lambda *a, **kw: None)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    from fastai.callback import wandb
    monkeypatch.setattr(wandb, 'wandb', fake)
    make('dream', wandb.WandbCallback(log_preds=False), metrics=[Scripted(.1, .2)]).fit(2)
    assert len(logged['train_loss']) == 4 and logged['valid_acc'] == [.1, .2]

# Selection

@pytest.mark.parametrize('run', [False, True])
def test_save_model(make, data, tmp_path, run):
    "The set is the best one in the end"
    keep, save, metrics = KeepCB(), SaveModelCallback('valid_acc'), [Scripted(.2, .5, .3, .4)]
    if run:
        distill(data, 'dream', out=tmp_path/'run', metrics=metrics, cbs=[keep, save], log=None, **SMALL)
        assert torch.equal(load_distilled(tmp_path/'run').pixels, keep.kept[1].clamp(0, 1))
    else:
        learn = make('dream', keep, save, metrics=metrics)
        learn.fit(4)
        assert torch.equal(pixels(learn), keep.kept[1]) and (tmp_path/'models'/'model.pth').exists()
    assert len(keep.kept) == 4

def test_early_stopping(data, tmp_path):
    "The last report is written, too"
    stop, metrics = EarlyStoppingCallback('valid_acc', patience=1), [Scripted(.2, .5, .3, .4)]
    distill(data, 'dream', out=tmp_path/'run', metrics=metrics, cbs=[stop], log=None, **SMALL)
    assert [(r['step'], r['valid_acc']) for r in read_history(tmp_path/'run')] == [(2, .2), (4, .5), (6, .3)]
    assert load_distilled(tmp_path/'run').provenance['steps'] == 6

@pytest.mark.parametrize('optimiser', ['sgd', 'adam'])
def test_reduce_lr_on_plateau(make, optimiser):
    keep = KeepCB()
    reduce, metrics = ReduceLROnPlateau('valid_acc', patience=1), [Scripted(.2, .1, .3, .4)]
    learn = make('dream', reduce, keep, metrics=metrics, optimiser=optimiser)
    learn.fit(4)
    assert keep.lrs == [learn.lr[0]]*2 + [learn.lr[0]/10]*2

def test_valid_accuracy(make):
    learn = make('dream', metrics=[ValidAccuracy(epochs=1, steps=10)])
    learn.fit(1)
    loss, acc = learn.final_record[1:]
    assert loss > 0 and 0 <= acc <= 1
    assert [*learn.validate()] == [loss, acc]

@pytest.mark.parametrize('cb', [SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau])
def test_nothing_is_selected_by_what_is_not_measured(data, tmp_path, cb):
    for monitor in 'valid_acc', 'valid_loss':
        with pytest.raises(ValueError, match=f'monitors {monitor}, which is not measured; give metrics='):
            distill(data, 'dream', out=tmp_path/'run', cbs=[cb(monitor)], **SMALL)
    assert not (tmp_path/'run').exists()

# Schedules

@pytest.mark.parametrize('method, fitted', [('dream', True), ('dsa', True), ('dream', False)])
def test_lr_find_leaves_no_trace(make, method, fitted):
    given = dict(momentum=.9) | (dict(label_lr=.1) if method == 'dream' else dict(n_data=None, net_epochs=1))
    found, plain = make(method, **given), make(method, **given)
    for learn in found, plain:
        if fitted: learn.fit(1)
    suggested = found.lr_find(num_it=7, show_plot=False)
    assert suggested.valley > 0
    for learn in found, plain: learn.fit(1)
    assert torch.equal(pixels(found), pixels(plain)) and torch.equal(found.model.labels, plain.model.labels)
    assert [r['loss'] for r in found.history_cb.rows] == [r['loss'] for r in plain.history_cb.rows]

def test_fit_one_cycle(make):
    learn = make()
    learn.fit_one_cycle(4)
    lrs = learn.recorder.lrs
    assert len(lrs) == 8 and lrs[0] < max(lrs) > lrs[-1] and max(lrs) == pytest.approx(learn.lr[0], rel=.1)

def test_fit_flat_cos(make):
    learn = make()
    learn.fit_flat_cos(4, pct_start=.5)
    assert learn.recorder.lrs[:4] == [learn.lr[0]]*4 and learn.recorder.lrs[-1] < learn.lr[0]

def test_param_scheduler(make):
    learn = make('dream', ParamScheduler(dict(lr=SchedCos(.1, .01))))
    learn.fit(4)
    assert learn.recorder.lrs[0] == pytest.approx(.1) and learn.recorder.lrs[-1] < .02

# Optimisation

def test_gradient_clip(make):
    free, clipped = make('dream', momentum=0., lr=1e3), make('dream', GradientClip(.01), momentum=0., lr=1e3)
    steps = []
    for learn in free, clipped:
        learn.add_cb(KeepCB())
        before = pixels(learn)
        learn.dls.train.report = 1
        learn.fit(1)
        steps.append((pixels(learn) - before).norm().item())
    assert steps[1] == pytest.approx(.01*clipped.lr[0], rel=1e-3) and steps[0] > 2*steps[1]

class GradientCB(Callback):
    "Gradient of each batch's loss, and the pixels before it"
    order = 1 # before accumulation
    def __init__(self): self.grads, self.before = [], []
    def after_loss(self):
        self.before.append(pixels(self.learn))
        self.grads.append(torch.autograd.grad(self.learn.loss, self.model.pixels, retain_graph=True)[0])

@pytest.mark.parametrize('method', ['dream', 'dm'])
def test_gradient_accumulation(make, method):
    "A step for every second batch, by the mean gradient; DM's is preconditioned once"
    own = dict(momentum=0., per_class_steps=False, clamp=False) if method == 'dream' else dict(momentum=0.)
    learn, seen = make(method, GradientAccumulation(2), **own), GradientCB()
    learn.add_cb(seen)
    learn.dls.train.report = 4
    learn.fit(1)
    assert torch.equal(seen.before[0], seen.before[1]) and torch.equal(seen.before[2], seen.before[3])
    step = sum(seen.grads[:2])/2
    if method == 'dm': step = precondition(learn.data, step)
    torch.testing.assert_close(seen.before[2], seen.before[0] - learn.lr[0]*step)

def test_terminate_on_nan(make):
    learn, plain = make('dream', TerminateOnNaNCallback()), make()
    for l in learn, plain: l.fit(2)
    assert torch.equal(pixels(learn), pixels(plain))

# Methods of a Learner

def test_a_second_fit_goes_on(make):
    once, twice = make(), make()
    once.fit(4)
    for _ in range(4): twice.fit(1)
    assert torch.equal(pixels(once), pixels(twice)) and once.dls.train.at == twice.dls.train.at == 8
    twice.fit(1) # beyond the recipe
    assert twice.dls.train.at == 10 and not torch.equal(pixels(once), pixels(twice))
    assert once.dls.train.epochs == 0

LOOKS = dict(validate=Learner.validate, summary=lambda l: str(l.summary()), show_results=Learner.show_results,
             get_preds=Learner.get_preds, get_preds_of_train=lambda l: l.get_preds(ds_idx=0),
             one_batch=lambda l: l.one_batch(0, l.dls.one_batch()), show_batch=lambda l: l.dls.show_batch(),
             save=lambda l: l.save('x'), export=lambda l: l.export('x.pkl'))

@pytest.mark.parametrize('look', LOOKS.values(), ids=LOOKS)
def test_looking_leaves_no_trace(make, look):
    "at a Learner that is not trained, half trained, and at its end"
    learns = make(ipc=3, limit=2, outer=1), make(ipc=3, limit=2, outer=1) # shows a random subset of the images
    for learn in learns:
        for _ in range(2):
            if learn is learns[0]: look(learn)
            learn.dls.train.report = 1
            learn.fit(1)
    look(learns[0])
    assert torch.equal(*map(pixels, learns)) and [l.dls.train.at for l in learns] == [2, 2]

def test_get_preds(make):
    learn = make('dream', ipc=[1, 3, 2], factor=2, start='noise')
    learn.fit(1)
    for kw in {}, dict(ds_idx=0):
        images, labels = learn.get_preds(**kw)
        x, y = learn.model.everything()
        assert torch.equal(images, x) and torch.equal(labels, y)
    (images, probabilities), labels = make('dream', label_lr=.1).get_preds()
    assert images.shape == (3, 1, 8, 8) and torch.equal(probabilities.argmax(1), labels)

def test_one_batch(make):
    "of a Learner in training is the next inner iteration"
    one, plain = make(), make()
    one.fit(1)
    one.training = True
    one.one_batch(0, one.dls.one_batch())
    plain.dls.train.report = 3
    plain.fit(1)
    assert torch.equal(pixels(one), pixels(plain)) and not torch.equal(pixels(one), pixels(make()))

def test_export(make, tmp_path):
    learn = make('dream', label_lr=.1, momentum=.9)
    learn.fit(1)
    learn.export('learner.pkl')
    back = load_learner(tmp_path/'learner.pkl')
    assert torch.equal(pixels(back), pixels(learn)) and torch.equal(back.model.labels, learn.model.labels)

def test_save_and_load(make, tmp_path):
    learn, other = (make('dream', momentum=.9) for _ in range(2))
    learn.fit(2)
    learn.save('set')
    other.path = tmp_path
    other.load('set')
    moments = [next(iter(l.opt.opt.state.values()))['momentum_buffer'] for l in (learn, other)]
    assert torch.equal(pixels(other), pixels(learn)) and torch.equal(*moments) and moments[0].norm() > 0

def test_a_batch_shows_real_images_of_every_class(data, monkeypatch):
    from dreamplus.loop import callbacks
    shown = []
    monkeypatch.setattr(callbacks, 'picture', lambda x, names, **kw: shown.append((x, names)))
    callbacks.DistillLoaders(data, callbacks.Iterations(1, 1)).show_batch(max_n=2)
    (x, names), train = shown[0], data.train
    assert names == data.classes
    for c, images in enumerate(x): assert torch.equal((images*255).round().byte(), train.x[train.y == c][:2])
