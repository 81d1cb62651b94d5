"Fast paths against the plain loop of the released codes, on odd shapes; and memory where classes are many."
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from benchmarks import __main__ as benchmark
from benchmarks import alternatives, chunks, plain
from benchmarks.__main__ import target
from notebooks import ROOT
from processes import Process

from dreamplus.choose.kmeans import kmeans
from dreamplus.choose.samplers import embed_classes
from dreamplus.core import Key, seeded
from dreamplus.data.sources import load_data
from dreamplus.loop.distill import distiller
from dreamplus.machine import peak_mib
from dreamplus.nets.augment import Augment
from dreamplus.nets.convnet import ConvNet
from dreamplus.nets.train import check_compiler, fast_call, sgd, train_step
from dreamplus.synthetic import decode

def learner(d, ipc=1, factor=1, **own):
    "A Learner of DREAM+ without a warm epoch"
    return distiller(d, 'dream+', ipc, factor, device='cpu', **own | dict(warm_epochs=0., start='noise'))

def data(counts, channels, size):
    "Random images, some classes smaller than a batch"
    with seeded(0): x = torch.randint(0, 256, (sum(counts), channels, size, size), dtype=torch.uint8)
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return load_data((x, y), test=(x, y))

@pytest.mark.parametrize('counts, channels, size, factor, ipc, batch, augment', [
    ((9, 9, 9), 1, 8, 1, 1, 4, ''),
    ((30, 12, 5), 3, 16, 2, 2, 8, 'color_crop_cutout'), # unequal, one smaller than the batch
    ((20, 20), 1, 16, 3, 1, 6, 'color_crop'), # f = 3 with padding
    ((12, 40, 12, 12, 12), 3, 12, 1, 3, 5, 'color_scale_rotate')])
@pytest.mark.parametrize('chunk', [1, 0])
def test_matching_is_the_plain_loop(counts, channels, size, factor, ipc, batch, augment, chunk):
    own = dict(width=8, batch_real=batch, augment=augment, chunk=chunk)
    learn = learner(data(counts, channels, size), ipc, factor, **own)
    to, see = target(learn), learn.loss_func.match.augment
    loss = learn.loss_func(learn.model(to.classes.index), to)
    ours, = torch.autograd.grad(loss, learn.model.pixels)
    pixels = learn.model.pixels.detach().clone().requires_grad_()
    total = plain.step(to.net, learn.data, pixels, to.real, see, to.draw, lambda x: decode(x, factor))
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert (ours - pixels.grad).norm() <= 1e-4*pixels.grad.norm()

def test_no_gradient_is_wasted():
    "Neither the network's weights gather a gradient, nor does the real side of an embedding matcher keep a graph"
    d = data((9, 9, 9), 1, 8)
    for match in ('bidirectional', 'embedding'):
        learn, saved = learner(d, width=8, batch_real=4, match=match), []
        to = target(learn)
        images = learn.model(to.classes.index)
        note = lambda t, saved=saved: saved.append(t.shape) or t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            learn.loss_func(images, to).backward()
        assert all(p.grad is None for p in to.net.parameters())
        kept = [s for s in saved if len(s) == 4 and s[0] == 4*learn.loss_func.match.chunk] # of four real images a class
        assert bool(kept) == (match == 'bidirectional')

@pytest.mark.parametrize('k', [1, 12])
def test_kmeans_is_the_plain_one(k):
    "From the same labels to the same centres as the one-hot clustering of the released codes"
    d = data((200, 150), 1, 8)
    with seeded(0): net = ConvNet(channels=1, classes=2, size=8, width=16)
    x, mask = embed_classes(net, d)
    x, labels = x.double(), torch.arange(mask.shape[1]) % k # float64: rounding moves no point to another centre
    found = kmeans(x, k, mask, start=labels.expand(mask.shape))
    for c in range(2):
        points = x[c][mask[c]]
        centres = plain.kmeans(points, torch.stack([points[j::k].mean(0) for j in range(k)]))
        torch.testing.assert_close(found.centres[c], centres)
        assert found.labels[c][mask[c]].tolist() == torch.cdist(points, centres).argmin(1).tolist()

needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')),
                                    reason='needs a C++ compiler, which is not here')

def frames(): return torch._dynamo.utils.counters['stats']['unique_graphs']

def no_cpp(monkeypatch, backend='eager'):
    "From here on, code is traced as for C++, and run by torch"
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=backend))

@needs_compiler
def test_compiled_code_is_the_network(monkeypatch):
    "to rounding, in C++"
    monkeypatch.setattr(torch._inductor.config, 'compile_threads', 1) # in this process
    with seeded(0): net = ConvNet(channels=1, classes=3, size=8, width=4, depth=1)
    check_compiler(torch.device('cpu'))
    x = torch.randn(6, 1, 8, 8)
    with torch.no_grad(): torch.testing.assert_close(fast_call(net, compiled=True)(x), net(x))

def test_a_compiled_network_is_the_network(monkeypatch):
    "to rounding, and its gradients; one compilation serves all networks of a kind, and none is for batches not named"
    no_cpp(monkeypatch, 'aot_eager') # which traces the gradients too
    before, x = frames(), torch.randn(6, 1, 8, 8)
    for seed in 0, 1:
        with seeded(seed): net = ConvNet(channels=1, classes=3, size=8, width=4, depth=1)
        call = fast_call(net, compiled=True, sizes={6})
        for batch in x, x[:5]:
            both = [torch.autograd.grad(f(batch).square().sum(), net.parameters()) for f in (net, call)]
            for expected, found in zip(*both): torch.testing.assert_close(found, expected)
        assert frames() == before + 1

def test_a_compiled_run_is_the_run(monkeypatch):
    "to rounding: the embeddings of a choice, the last ones in a batch of their own, and the networks' training"
    no_cpp(monkeypatch)
    d, compilations = data((80, 70), 1, 8), []
    usual, fast = (learner(d, width=4, batch_real=6, n_data=24, **how) for how in ({}, dict(compiled=True)))
    for seed in 0, 1:
        for learn in usual, fast:
            learn.network_cb.schedule.begin(Key(seed, 'network'))
            learn.network_cb.schedule.after_update(None, Key(seed, 'train'))
        nets = [learn.network_cb.schedule.net for learn in (usual, fast)]
        for a, b in zip(*(net.parameters() for net in nets)): torch.testing.assert_close(a, b)
        expected, found = embed_classes(nets[0], d)[0], embed_classes(nets[0], d, compiled=True)[0]
        torch.testing.assert_close(found, expected)
        chosen = fast.sample_cb.sampler(nets[1], d.class_batch(), Key(seed))
        assert d.train.y[chosen].tolist() == [[0]*6, [1]*6]
        compilations.append(frames())
    assert 0 < compilations[0] == compilations[1] # made once, for all networks

def test_bfloat16_rounds_the_network_and_nothing_else():
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    with seeded(0): nets = [ConvNet(channels=1, classes=3, size=8, width=4) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    call = fast_call(nets[1], bf16=True)
    assert call(x).dtype == torch.float32
    losses = [train_step(f, sgd(net), x, y, Augment('')) for f, net in zip((nets[0], call), nets)]
    assert losses[0] != losses[1] == pytest.approx(losses[0].item(), rel=.02)
    for a, b in zip(*(net.parameters() for net in nets)):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, a, atol=1e-3, rtol=0)

PEAK = """ # without torch, which takes seconds to import
import sys, types
torch = sys.modules['torch'] = types.ModuleType('torch')
torch.__getattr__ = lambda name: type(name, (), dict(type='cpu'))
from dreamplus.machine import peak_mib
print(peak_mib(torch.device()))
"""

def test_peak_memory_is_that_of_this_program_alone():
    "not of the one that started it, here with half a GiB more"
    large = torch.ones(2**27)
    said = subprocess.run([sys.executable, '-c', PEAK], text=True, capture_output=True, check=True).stdout
    del large
    assert peak_mib(torch.device('cpu')) > float(said) + 400

def told(folder, argv):
    "The benchmark, with pipes in `folder` as its input and output"
    sys.stdin, sys.stdout, sys.argv = open(folder/'in'), open(folder/'out', 'w'), ['benchmarks', *argv] # noqa: SIM115
    benchmark.main()

def test_benchmark_runs(tmp_path, monkeypatch):
    "The smallest shape, from the command to the record and the plot; one process of its own"
    def popen(command, **_): # begins in milliseconds
        for name in 'in', 'out': os.mkfifo(tmp_path/name)
        process = Process(told, tmp_path, command[3:])
        pipes = dict(stdin=open(tmp_path/'in', 'w'), stdout=open(tmp_path/'out')) # noqa: SIM115
        return SimpleNamespace(**pipes, communicate=lambda: (pipes['stdin'].close(), ended.append(process.end())))
    ended = []
    monkeypatch.setattr(subprocess, 'Popen', popen)
    monkeypatch.chdir(ROOT)
    for name in 'SPAN', 'REST': monkeypatch.setattr(benchmark, name, 0)
    monkeypatch.setitem(benchmark.SHAPES, 'digits', benchmark.SHAPES['digits'] | dict(images=200, width=4, batch=8))
    monkeypatch.setitem(benchmark.SMALL, 'images', 200)
    monkeypatch.setitem(benchmark.GROWTH, 'ipc', (2,))
    def main(*argv):
        monkeypatch.setattr(sys, 'argv', ['benchmarks', *argv])
        with redirect_stdout(io.StringIO()) as said: benchmark.main()
        return said.getvalue()
    monkeypatch.setattr(subprocess, 'run', lambda command, **_: SimpleNamespace(stdout=main(*command[3:])))
    out = tmp_path/'record.json'
    main(*'--shapes digits --growth ipc --inner 2 --also candidates,untuned --out'.split(), str(out))
    record = json.loads(out.read_text())
    assert record['parts']['digits']['ratio'].keys() == {'selection', 'matching', 'training', 'inner', 'outer'}
    assert [row['ipc'] for row in record['growth']['ipc']] == [2] and out.with_suffix('.png').exists()
    sides = record['parts']['digits']
    assert all(v > 0 for side in ('ours', 'candidates', 'untuned', 'plain') for v in sides[side].values())
    assert ended == [(None, 0)]

def test_alternatives_are_measured(tmp_path, monkeypatch):
    "All but what needs a compiler, on few digits"
    out = tmp_path/'alternatives.json'
    small = dict(NETS=2, STEPS=3, IPC=8, KEPT=16, CANDIDATES=(40,))
    for name, value in small.items(): monkeypatch.setattr(alternatives, name, value)
    ways = '--width', '4', '--ways', 'bfloat16,channels_last,threads,vmap'
    monkeypatch.setattr(sys, 'argv', ['alternatives', *ways, '--out', str(out), 'digits'])
    alternatives.main()
    found = json.loads(out.read_text())['data_sets']['digits']
    assert found['embedding']['own']['changed'] == 0 == found['embedding']['threads']['changed']
    assert all(.8 < found['clustering'][way]['inertia'] < 1.25 for way in ('own', 'plain'))
    assert found['choosing'].keys() == {'own', 'random', '40 candidates'}
    assert found['choosing']['own']['spread'] == 1 < found['choosing']['random']['spread']
    assert found['matching'].keys() == {'own', 'bfloat16'} and 0 < found['matching']['bfloat16']['off'] < .5
    assert found['training'].keys() == {'own', 'bfloat16', 'threads', 'vmap'}
    assert all(v['seconds'] > 0 for part in found.values() for v in part.values())

def test_chunks_are_timed(tmp_path, monkeypatch):
    "The smallest images, in which all classes go through at once"
    out = tmp_path/'chunks.json'
    monkeypatch.setattr(chunks, 'SHAPES', [dict(size=8, batch=4, width=4)])
    monkeypatch.setattr(sys, 'argv', ['chunks', '--out', str(out)])
    chunks.main()
    step, = json.loads(out.read_text())['steps']
    assert step['chosen'] == 10 and all(step['seconds'][c] > 0 for c in ('1', '2', '5', '10'))
