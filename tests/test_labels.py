"Labels are data, from the loss to the file: class numbers or probabilities, learned or fixed, any number of images."
import json

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback

from dreamplus.core import load_state, save_state, seeded, toy_images
from dreamplus.data.core import to_float
from dreamplus.data.sources import load_data
from dreamplus.distilled import DistilledSet, load_distilled
from dreamplus.loop.distill import distill, distiller, resume
from dreamplus.match.core import MATCHERS, Matcher
from dreamplus.match.experts import train_experts
from dreamplus.synthetic import SyntheticSet, decode

TINY = dict(outer=2, inner=3, width=8, depth=2, factor=1, batch_real=4, n_data=8, net_batch=8, augment='',
            net_augment='', net_mix=0., distance='mse', per_class_steps=False, momentum=0., lr_base=None, lr=.01)
UNEVEN = [1, 3, 2]

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(classes=3, per_class=20, size=8))

def softened(counts):
    "Labels (N,) of classes with these numbers of images, and probabilities (N,C) of which these are the most probable"
    hard = torch.repeat_interleave(torch.tensor(counts))
    with seeded(0): noise = torch.rand(len(hard), len(counts))
    return hard, (F.one_hot(hard, len(counts)) + noise*.9).softmax(1)

# The set while it is learned

@pytest.mark.parametrize('counts', [[2, 2, 2], UNEVEN], ids=str)
def test_synthetic_set_shows_images_with_their_labels(counts):
    hard, soft = softened(counts)
    pixels = torch.rand(len(hard), 1, 8, 8)
    plain, both = SyntheticSet(pixels, hard, factor=2), SyntheticSet(pixels, soft, factor=2)
    for classes in torch.arange(3), torch.tensor([2, 0]):
        expected = [decode(pixels[hard == c], 2) for c in classes]
        own = [soft[hard == c].repeat(4, 1) for c in classes] # all images cut at one place, then those cut at the next
        images, labels = both(classes)
        torch.testing.assert_close(images, torch.cat(expected))
        torch.testing.assert_close(plain(classes), torch.cat(expected))
        torch.testing.assert_close(labels, torch.cat(own))
    assert plain.counts == both.counts == counts
    assert torch.equal(plain.everything()[1], hard.repeat_interleave(4))
    torch.testing.assert_close(both.everything()[1], torch.cat([soft[hard == c].repeat(4, 1) for c in range(3)]))

def test_fixed_soft_labels_get_no_gradient():
    hard, soft = softened(UNEVEN)
    assert SyntheticSet(torch.rand(6, 1, 8, 8), soft).logits.requires_grad is False
    assert SyntheticSet(torch.rand(6, 1, 8, 8), soft, label_lr=.1).logits.requires_grad is True

# The finished set

@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('counts', [[2, 2, 2], UNEVEN, [2, 0, 1]], ids=str)
def test_distilled_set_keeps_images_and_labels_together(tmp_path, counts, soft):
    hard, probabilities = softened(counts)
    y, x = probabilities if soft else hard, hard[:, None, None, None].expand(-1, 1, 8, 8)/10
    mixed = torch.randperm(len(hard))
    dset = DistilledSet(x[mixed], ['a', 'b', 'c'], [.5], [.2], factor=2, y=y[mixed]) # in any order
    assert (dset.counts, dset.soft) == (counts, soft)
    dset.save(tmp_path/'set')
    for s in dset, load_distilled(tmp_path/'set'):
        for decoded in False, True:
            images, labels = s.images(decoded), s.labels(decoded)
            owner = labels.argmax(1) if soft else labels
            assert torch.equal(owner, hard.repeat_interleave(4 if decoded else 1)) # sorted by class
            assert torch.equal((images[:, 0, 0, 0]*10).round().long(), owner)
    assert len(s.dataset()) == 4*len(hard) and torch.equal(s.dataset()[5][1], s.labels()[5])
    s.to_imagefolder(tmp_path/'images')
    assert [len([*(tmp_path/'images'/c).iterdir()]) for c in 'abc'] == [4*n for n in counts]
    assert s.show(decoded=True).size[0] > 0
    xb, yb = s.dls(bs=4).one_batch()
    assert yb.shape == ((4, 3) if soft else (4,))

# Files

INFO = dict(classes=['cat', 'dog', 'fox'], mean=[.5], std=[.2], factor=2, decode='single',
            evaluation=dict(arch='convnet'), provenance=dict(method='dm'))

def written(folder, format, **tensors):
    "A file as a version of this package wrote it"
    save_state(folder/'distilled.safetensors', tensors)
    (folder/'distilled.json').write_text(json.dumps(dict(format=format) | INFO))
    return load_distilled(folder)

def test_format_1(tmp_path):
    pixels = torch.rand(3, 2, 1, 8, 8)
    dset = written(tmp_path, 1, pixels=pixels, labels=torch.arange(3).repeat_interleave(2)) # as 0.1 did
    assert torch.equal(dset.pixels, pixels.flatten(0, 1)) and dset.labels(decoded=False).tolist() == [0, 0, 1, 1, 2, 2]
    assert (dset.classes, dset.factor, dset.ipc) == (INFO['classes'], 2, 2)
    assert torch.equal(dset.images(), decode(pixels, 2).flatten(0, 1))

def test_format_1_without_labels_is_in_the_order_of_its_classes(tmp_path):
    assert written(tmp_path, 1, pixels=torch.rand(3, 2, 1, 8, 8)).y.tolist() == [0, 0, 1, 1, 2, 2]

@pytest.mark.parametrize('format', [1, 2])
def test_labels_of_a_file_are_used(tmp_path, format):
    "0.1 ignored them"
    pixels = torch.arange(6.).view(3, 2, 1, 1, 1).expand(-1, -1, -1, 8, 8)
    dset = written(tmp_path, format, pixels=pixels.contiguous(), labels=torch.tensor([2, 0, 1, 1, 0, 2]))
    assert dset.pixels[:, 0, 0, 0].tolist() == [1, 4, 2, 3, 0, 5] and dset.y.tolist() == [0, 0, 1, 1, 2, 2]

def test_format_2(tmp_path):
    hard, soft = softened(UNEVEN)
    for y in hard, soft:
        DistilledSet(torch.rand(6, 1, 8, 8), **INFO, y=y).save(tmp_path)
        assert json.loads((tmp_path/'distilled.json').read_text())['format'] == 2
        assert torch.equal(load_state(tmp_path/'distilled.safetensors')['labels'], y)
        assert torch.equal(load_distilled(tmp_path).y, y)

@pytest.mark.parametrize('labels, said', [
    (torch.tensor([0, 1, 2]), 'do not fit together'), (torch.tensor([0, 0, 1, 1, 2, 3]), 'whole numbers from 0 to 2'),
    (torch.tensor([0, 0, 1, 1, 2, -1]), 'whole numbers from 0 to 2'), (torch.rand(6), 'whole numbers from 0 to 2'),
    (torch.rand(6, 4), 'are not for 3 classes'), (torch.full((6, 3), float('nan')), 'not finite')],
    ids=lambda v: str(v)[:20])
def test_labels_that_fit_nothing_are_refused(tmp_path, labels, said):
    with pytest.raises(ValueError, match=said): written(tmp_path, 2, pixels=torch.rand(6, 1, 8, 8), labels=labels)

# Matching

class PlainLoopCB(Callback):
    "Computes the gradients of an inner iteration again: class by class, layer by layer"
    order = 90
    def before_step(self):
        target, data, model = self.yb[0], self.learn.data, self.model
        pixels, logits = (p if p is None else p.detach().requires_grad_() for p in (model.pixels, model.logits))
        weights, loss = [p for p in target.net.parameters() if p.ndim == 4], 0
        hard = torch.repeat_interleave(torch.tensor(model.counts))
        for c in target.classes.ids:
            images = data.normalize(to_float(data.train.x[target.real[c]]))
            real = F.cross_entropy(target.net(images), torch.full((4,), c))
            answers = target.net(data.normalize(pixels[hard == c])).log_softmax(1)
            y = F.one_hot(hard[hard == c], data.n_classes) if logits is None else logits[hard == c].softmax(1)
            syn = -(y*answers).sum(1).mean()
            real, syn = torch.autograd.grad(real, weights), torch.autograd.grad(syn, weights, create_graph=True)
            loss += sum((a - b).square().sum() for a, b in zip(real, syn))
        torch.testing.assert_close(self.learn.loss.detach(), loss.detach(), rtol=1e-4, atol=1e-6)
        inputs = [pixels] if logits is None else [pixels, logits]
        for p, g in zip((model.pixels, model.logits), torch.autograd.grad(loss, inputs)):
            assert g.norm() > 0 and (p.grad - g).norm() <= 1e-4*g.norm()
        self.learn.compared = getattr(self.learn, 'compared', 0) + 1

@pytest.mark.parametrize('label_lr', [None, 1.])
@pytest.mark.parametrize('ipc', [2, UNEVEN], ids=str)
def test_matching_equals_a_plain_loop(data, ipc, label_lr):
    learn = distiller(data, 'idc', ipc, cbs=[PlainLoopCB()], label_lr=label_lr, **TINY)
    with learn.no_bar(): learn.fit(1)
    assert learn.compared == learn.dls.train.at > 0

@pytest.mark.parametrize('method', ['idc', 'dm', 'dsa', 'datadam'])
def test_methods_take_uneven_classes_and_learned_labels(data, method):
    given = {k: v for k, v in TINY.items() if method == 'idc' or k not in ('n_data', 'distance')}
    given |= dict(net_epochs=1) if method == 'dsa' else dict(n_data=8)
    first, last = (distill(data, method, UNEVEN, label_lr=.5, log=None, **given | dict(outer=n)) for n in (1, 3))
    assert last.counts == UNEVEN and last.soft and (first.pixels - last.pixels).abs().max() > 0

def test_trajectories_take_uneven_classes_and_learned_labels(data, tmp_path):
    folder = train_experts(data, tmp_path, n=1, epochs=3, width=8, log=None).path
    dset = distill(data, 'mtt', UNEVEN, experts=str(folder), max_start=1, syn_steps=2, expert_epochs=1, zca=False,
                   width=8, outer=3, label_lr=.001, syn_lr=.1, log=None)
    assert dset.counts == UNEVEN
    assert (dset.y.max(1).values - (.9 + .1/3)).abs().max() > .001 # labels moved

class Apart(Matcher):
    "A coupled matcher: keeps the mean embeddings of the classes apart"
    separable, needs_real = False, False
    def terms(self, real, syn): return dict(apart=-torch.pdist(syn.embed.mean(1)).mean())

def test_coupled_matchers_refuse_uneven_sets(data, monkeypatch, tmp_path):
    monkeypatch.setitem(MATCHERS, 'apart', Apart)
    with pytest.raises(ValueError, match='compares classes with each other and needs equally many images of each'):
        distill(data, 'dm', UNEVEN, match='apart + embedding', log=None, width=8, out=tmp_path/'run')
    assert not (tmp_path/'run').exists() # before any work
    few = distill(data, 'dm', 2, match='apart + embedding', log=None, width=8, outer=2)
    assert few.counts == [2, 2, 2]

# Learned labels in a run

def test_learned_labels_change_and_are_saved(data, tmp_path):
    args = TINY | dict(label_lr=5., log=None)
    dset = distill(data, 'idc', 2, out=tmp_path/'run', **args)
    start = load_state(tmp_path/'run'/'start.safetensors')['labels']
    torch.testing.assert_close(start, .9*F.one_hot(dset.labels(False).argmax(1), 3) + .1/3)
    assert (dset.y - start).abs().max() > .01
    torch.testing.assert_close(dset.y.sum(1), torch.ones(6))
    assert torch.equal(load_distilled(tmp_path/'run').y, dset.y)

def test_a_stopped_run_goes_on_with_its_labels(data, tmp_path):
    class StopCB(Callback):
        order = 90
        def after_batch(self): self.learn.checkpoint_cb.stop = self.learn.dls.train.at == 4
    args = TINY | dict(label_lr=5., log=None)
    whole = distill(data, 'idc', UNEVEN, **args)
    with pytest.raises(KeyboardInterrupt): distill(data, 'idc', UNEVEN, out=tmp_path/'run', cbs=[StopCB()], **args)
    rest = resume(tmp_path/'run', data, log=None)
    assert torch.equal(rest.y, whole.y) and torch.equal(rest.pixels, whole.pixels)

def test_the_rate_of_labels_is_theirs_alone(data):
    still = distill(data, 'idc', 2, label_lr=0., log=None, **TINY)
    torch.testing.assert_close(still.y, .9*F.one_hot(still.y.argmax(1), 3) + .1/3)
    moved = distill(data, 'idc', 2, label_lr=5., log=None, **TINY | dict(lr=0.))
    assert torch.equal(moved.pixels, distill(data, 'idc', 2, log=None, **TINY | dict(lr=0.)).pixels)
    assert (moved.y - still.y).abs().max() > .01

# Numbers of images

def test_images_of_each_class(data):
    "Each class begins as it would if all had so many"
    still = TINY | dict(lr=0., log=None)
    uneven = distill(data, 'idc', UNEVEN, **still)
    assert (uneven.counts, uneven.ipc) == (UNEVEN, 2)
    for c, n in enumerate(UNEVEN):
        even = distill(data, 'idc', n, **still)
        assert torch.equal(uneven.pixels[uneven.y == c], even.pixels[even.y == c])

@pytest.mark.parametrize('ipc, said', [
    ([1, 2], r'ipc=\[1, 2\] has 2 numbers for 3 classes; give one for each class'), ([1, 0, 2], 'must be at least 1'),
    ([1, 2.5, 2], 'must be at least 1'), ([1, 1, 100], "class 'two' has|has 14; use a smaller --ipc")], ids=str)
def test_wrong_numbers_are_refused(data, ipc, said):
    with pytest.raises(ValueError, match=said): distill(data, 'idc', ipc, log=None, **TINY)

@pytest.mark.parametrize('change, said', [
    (dict(pixels=torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), 'images are uint8'),
    (dict(mean=[.5, .5]), 'for 1 channels'),
    (dict(factor=5), 'factor=5 must be'), (dict(decode='x'), "decode='x' is unknown"),
    (dict(y=torch.full((2, 2), -1.)), 'not probabilities'), (dict(y=torch.ones(2, 2)), 'not probabilities')])
def test_sets_that_cannot_be_trained_on(change, said):
    right = dict(pixels=torch.zeros(2, 1, 8, 8), classes=['a', 'b'], mean=[.5], std=[.2], y=torch.arange(2))
    with pytest.raises(ValueError, match=said): DistilledSet(**right | change)
