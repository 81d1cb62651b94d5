"Clusters, picks, samplers and coresets against slow oracles: one class, one point, one centre at a time, in float64."
from functools import partial

import pytest
import torch

from dreamplus.choose.coresets import CORESETS, coreset, gradient_norms
from dreamplus.choose.kmeans import kmeans, lloyd, nearest, random_columns, representatives
from dreamplus.choose.samplers import (SAMPLERS, RandomSampler, RepresentativeSampler, SubclusterSampler, class_parts,
                                       class_table, embed_classes)
from dreamplus.core import Key, load_state, save_state, seeded, toy_images
from dreamplus.data.sources import load_data
from dreamplus.nets.convnet import ConvNet

@pytest.fixture(autouse=True)
def _seed():
    with seeded(0): yield

def unequal(counts, size=8, channels=1):
    "Data with the given numbers of images of each class"
    x, y = toy_images(len(counts), max(counts), size, channels)
    keep = torch.cat([torch.arange(n) + c*max(counts) for c, n in enumerate(counts)])
    return load_data((x[keep], y[keep]), test=(x, y))

def cloud(counts=(40, 7, 23), dim=5):
    "Points (C,N,D) in float64 and their mask; masked points are far away"
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    x = torch.randn(*mask.shape, dim, dtype=torch.float64)
    return x.masked_fill(~mask[..., None], 1e3), mask

def rows(*purpose, n=3): return Key(0, *purpose, rows=torch.arange(n))
def square(a, b): return sum((p - q)**2 for p, q in zip(a.tolist(), b.tolist()))
def starts(x, mask, k, key): return torch.take_along_dim(x, random_columns(mask, k, key)[..., None], 1)

# The oracle: Lloyd's algorithm as the specification words it, for the points of one class

def slow_kmeans(points, centres, max_iter=100, tol=1e-4):
    centres = centres.clone()
    for _ in range(max_iter):
        d = [[square(p, c) for c in centres] for p in points]
        label = [row.index(min(row)) for row in d]
        own = [row[i] for row, i in zip(d, label)]
        farthest = iter(sorted(range(len(points)), key=lambda i: -own[i]))
        new = centres.clone()
        for k in range(len(centres)):
            mine = [p for p, i in zip(points, label) if i == k]
            new[k] = torch.stack(mine).mean(0) if mine else points[next(farthest)]
        error = sum(square(a, b) for a, b in zip(new, centres))
        centres = new
        if error <= tol: break
    return centres

def slow_picks(points, centres, s):
    return [i for c in centres for i in sorted(range(len(points)), key=lambda i: square(points[i], c))[:s]]

# k-means

@pytest.mark.parametrize('k, chunk', [(1, None), (3, 2), (6, 3)])
def test_kmeans_is_lloyds_algorithm(k, chunk):
    x, mask = cloud()
    found, begin = kmeans(x, k, mask, chunk=chunk, key=rows('a')), starts(x, mask, k, rows('a'))
    for c in range(3):
        points = x[c][mask[c]]
        slow = slow_kmeans(points, begin[c])
        torch.testing.assert_close(found.centres[c], slow)
        d = torch.tensor([[square(p, q) for q in slow] for p in points], dtype=torch.float64)
        assert found.labels[c][mask[c]].tolist() == d.argmin(1).tolist()
        torch.testing.assert_close(found.distance[c][mask[c]], d.min(1)[0])

def test_kmeans_stops_by_the_sum_of_squared_movement():
    "and a class that is done waits for the others without moving"
    x, mask = cloud((150, 20, 60), dim=3)
    begin = starts(x, mask, 4, rows('a'))
    for tol in .01, 1:
        together = lloyd(x, mask, begin, 100, tol)
        for c in range(3):
            torch.testing.assert_close(together.centres[c], slow_kmeans(x[c][mask[c]], begin[c], tol=tol))
    assert lloyd(x, mask, begin, 2, 0).rounds == 2

def test_empty_clusters_restart_at_the_farthest_points():
    x, mask = cloud()
    begin = x[:, :1].expand(-1, 5, -1) # all at one place: four of five are empty
    found = lloyd(x, mask, begin)
    for c in range(3):
        assert len(found.labels[c][mask[c]].unique()) == 5
        torch.testing.assert_close(found.centres[c], slow_kmeans(x[c][mask[c]], begin[c]))

def test_more_clusters_than_points():
    x, mask = cloud((12, 3))
    found = kmeans(x, 8, mask)
    assert found.centres[1].abs().max() < 100 # no centre went to a masked point
    torch.testing.assert_close(found.distance[1][:3], torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)

@pytest.mark.parametrize('start', ['sample', '++'])
def test_identical_points(start):
    found = kmeans(torch.ones(2, 10, 3), 4, start=start)
    assert found.distance.max() == 0 and found.rounds <= 2

def test_plusplus_finds_separate_blobs():
    x = ((torch.eye(12)*20).repeat_interleave(9, 0) + torch.randn(108, 12))[None].repeat(3, 1, 1)
    for key in None, rows('a'):
        begin = kmeans(x, 12, start='++', max_iter=0, key=key).centres
        assert all(sorted(row) == list(range(12)) for row in begin.argmax(2).tolist()) # the axis of each blob

def test_starts_lie_under_the_mask():
    x, mask = cloud((30, 2, 9))
    for start in 'sample', '++': assert kmeans(x, 9, mask, start, max_iter=0, key=rows('a')).centres.abs().max() < 100
    assert [len(row.unique()) for row in random_columns(mask, 9)] == [9, 2, 9]

@pytest.mark.parametrize('key', [None, rows('many', n=4000)], ids=['torch', 'key'])
def test_random_columns_are_uniform_and_without_replacement(key):
    mask = (torch.arange(6) < torch.tensor([6, 4])[:, None]).repeat(2000, 1)
    draws = random_columns(mask, 3, key).view(2000, 2, 3)
    assert (draws.sort(2).values.diff(dim=2) > 0).all()
    for c, n in enumerate((6, 4)):
        share = torch.bincount(draws[:, c].flatten(), minlength=6)/2000
        torch.testing.assert_close(share, (torch.arange(6) < n)*3/n, atol=.06, rtol=0)

@pytest.mark.parametrize('start', ['sample', '++'])
def test_classes_do_not_depend_on_each_other(start):
    "Any chunks, and a class alone whose table is narrower, give the same bits"
    x, mask = cloud((30, 12, 25, 7, 30))
    x = x.float()
    whole = kmeans(x, 6, mask, start, chunk=5, key=rows('a', n=5))
    for chunk in 1, 2:
        found = kmeans(x, 6, mask, start, chunk=chunk, key=rows('a', n=5))
        assert all(torch.equal(a, b) for a, b in zip(whole[:3], found[:3]))
    alone = kmeans(x[1:2, :12], 6, mask[1:2, :12], start, key=Key(0, 'a', rows=torch.tensor([1])))
    assert torch.equal(alone.centres, whole.centres[1:2])

# Picks

@pytest.mark.parametrize('s', [1, 3])
def test_nearest_by_brute_force(s):
    x, mask = cloud()
    x = x.masked_fill(~mask[..., None], 0) # in the middle, where they would be nearest
    centres = torch.randn(3, 4, 5, dtype=torch.float64)
    assert nearest(x, centres, mask, s).tolist() == [slow_picks(x[c][mask[c]], centres[c], s) for c in range(3)]

def test_nearest_repeats_a_class_that_is_too_small():
    x, mask = cloud((9, 2))
    picks = nearest(x, torch.zeros(2, 3, 5, dtype=torch.float64), mask, s=5).view(2, 3, 5)
    order = slow_picks(x[1][:2], torch.zeros(1, 5), 2)
    assert picks[1].tolist() == [(order*3)[:5]]*3
    assert len(picks[0, 0].unique()) == 5

@pytest.mark.parametrize('m, s', [(6, 1), (6, 3)])
def test_representatives_against_the_specification(m, s):
    "by distance, since a centre between two points is as far from the one as from the other"
    x, mask = cloud()
    picks, begin = representatives(x, m, mask, s=s, key=rows('a')), starts(x, mask, m//s, rows('a'))
    for c in range(3):
        points = x[c][mask[c]]
        centres = slow_kmeans(points, begin[c])
        slow, ours = slow_picks(points, centres, s), picks[c].tolist()
        ours, slow = ([square(points[i], centres[j//s]) for j, i in enumerate(found)] for found in (ours, slow))
        assert ours == pytest.approx(slow)

def test_tiny_takes_the_nearest_to_any_centre():
    x, mask = cloud((40, 4, 23))
    picks, begin = representatives(x, 6, mask, rule='tiny', key=rows('a')), starts(x, mask, 6, rows('a'))
    for c in 0, 2:
        points = x[c][mask[c]]
        own = [min(square(p, q) for q in slow_kmeans(points, begin[c])) for p in points]
        assert picks[c].tolist() == sorted(range(len(points)), key=own.__getitem__)[:6]
    assert mask.gather(1, picks).all() and len(picks[1].unique()) == 4

@pytest.mark.parametrize('raw', [False, True])
def test_embeddings_are_those_of_each_image(raw):
    data = unequal([9, 3, 5], channels=3)
    net = ConvNet(3, 3, 8, width=8).requires_grad_(False)
    e, mask = embed_classes(net, data, raw=raw, batch=4)
    assert mask.sum(1).tolist() == data.train.counts == [9, 3, 5]
    for c in range(3):
        x = data.train.x[data.train.y == c].float()/255
        if not raw: x = (x - data.mean)/data.std
        torch.testing.assert_close(e[c][mask[c]], torch.stack([net.embed(i[None])[0] for i in x]))
    some, mask = embed_classes(net, data, [2, 1], raw=raw)
    assert mask.sum(1).tolist() == [5, 3]
    torch.testing.assert_close(some, e[[2, 1], :5].where(mask[..., None], some))

# Samplers

COUNTS = [10, 3, 7]

@pytest.mark.parametrize('batch', [1, 3, 4, 10, 25])
def test_random_sampler_is_a_stream_for_each_class(batch):
    "A pass shows no image twice and drops its tail; a small class comes whole, as evenly as can be"
    data = unequal(COUNTS)
    sampler = RandomSampler(data, batch)
    calls = torch.stack([sampler(None, data.class_batch(), Key(0, i)) for i in range(40)]) # (40,C,B)
    assert calls.shape == (40, 3, batch)
    for c, n in enumerate(COUNTS):
        assert (data.train.y[calls[:, c]] == c).all()
        if batch > n:
            for row in calls[:, c]:
                count = torch.bincount(row - data.train.starts[c], minlength=n)
                assert len(count) == n and count.max() - count.min() <= 1
            continue
        last = n//batch
        passes = [calls[i:i + last, c].flatten() for i in range(0, 40 - last + 1, last)]
        assert all(len(p.unique()) == last*batch for p in passes)
        if n > 1 and len(passes) > 3: assert len({tuple(p.tolist()) for p in passes}) > 1
        assert len(torch.cat(passes).unique()) == n # images of a dropped tail come in another pass

MAKERS = dict(random=RandomSampler, representative=RepresentativeSampler, subcluster=SubclusterSampler,
              tiny=partial(RepresentativeSampler, rule='tiny'), candidates=partial(RepresentativeSampler, candidates=9),
              cold=partial(RepresentativeSampler, candidates=9, warm_rounds=0))
FRESH = True, False, True, False

@pytest.mark.parametrize('name', MAKERS)
def test_a_restored_sampler_continues(name, tmp_path):
    data, net, make = unequal((40, 5, 35)), ConvNet(1, 3, 8, width=8), MAKERS[name]
    sampler, again, every = make(data, 4), make(data, 4), data.class_batch()
    again.load_state_dict(again.state_dict()) # of a run that has not begun
    for i in range(3): sampler(net, every, Key(0, i))
    save_state(tmp_path/'s', dict(sampler=sampler.state_dict()))
    expected = [sampler(net, every, Key(1, i), fresh) for i, fresh in enumerate(FRESH[1:])]
    again.load_state_dict(load_state(tmp_path/'s')['sampler'])
    for i, (fresh, e) in enumerate(zip(FRESH[1:], expected)): assert torch.equal(again(net, every, Key(1, i), fresh), e)

@pytest.mark.parametrize('name', MAKERS)
def test_classes_are_chosen_from_alone_or_together(name):
    "Some classes in this call and others in the next, as with several processes, choose what one call chooses"
    data, net, make = unequal((40, 5, 35, 12)), ConvNet(1, 4, 8, width=8), MAKERS[name]
    whole, parts, every = make(data, 4), make(data, 4), data.class_batch()
    for i, fresh in enumerate(FRESH):
        expected = whole(net, every, Key(0, i), fresh)
        assert (data.train.y[expected] == torch.arange(4)[:, None]).all() and expected.shape == (4, 4)
        for ids in [3, 0], [1], [2]:
            assert torch.equal(parts(net, data.class_batch(ids), Key(0, i), fresh), expected[ids])

@pytest.mark.parametrize('rule, s', [('nearest', 1), ('nearest', 2), ('tiny', 1)])
def test_representative_sampler(rule, s):
    data, net = unequal(COUNTS), ConvNet(1, 3, 8, width=8)
    sampler = RepresentativeSampler(data, 6, rule=rule, subsample=s)
    found = sampler(net, data.class_batch(), Key(5))
    x, mask = embed_classes(net, data)
    picks = representatives(x, 6, mask, rule, s, key=Key(5, 'centres', rows=torch.arange(3)))
    assert torch.equal(found, class_table(data.train)[0].gather(1, picks)) and sampler.interval == 10

def test_warm_start():
    "For the same network a sampler starts from its last clusters, for a new one from new points"
    data, net = unequal((40, 30, 35)), ConvNet(1, 3, 8, width=8)
    sampler, every, anew = RepresentativeSampler(data, 6), data.class_batch(), RepresentativeSampler(data, 6)
    sampler(net, every, Key(5))
    x, mask = embed_classes(net, data)
    found = kmeans(x, 6, mask, start=sampler.labels.long(), max_iter=10, key=rows('centres'))
    expected = class_table(data.train)[0].gather(1, nearest(x, found.centres, mask))
    assert torch.equal(sampler(net, every, Key(0), fresh=False), expected)
    assert torch.equal(sampler(net, every, Key(7)), anew(net, every, Key(7), fresh=False)) # has no clusters yet
    assert not torch.equal(anew(net, every, Key(0)), expected)

def test_candidates():
    "The representatives of some images, others for another network; a small class is all there"
    data, net = unequal((40, 5, 35)), ConvNet(1, 3, 8, width=8)
    sampler, every, groups = RepresentativeSampler(data, 4, candidates=9), data.class_batch(), []
    for i, fresh in enumerate(FRESH[:3]):
        found = sampler(net, every, Key(0, i), fresh)
        place, mask = sampler.table(every.ids, every.index, kept=True)
        groups.append([row[m].sort().values for row, m in zip(place, mask)])
        assert torch.equal(groups[-1][1], torch.arange(40, 45)) and mask.sum(1).tolist() == [9, 5, 9]
        for at, picks in zip(groups[-1], found): assert len(at.unique()) == len(at) and torch.isin(picks, at).all()
    assert torch.equal(groups[0][0], groups[1][0]) and not torch.equal(groups[0][0], groups[2][0])

def test_large_data_goes_through_in_parts(monkeypatch):
    data, net = unequal((40, 30, 35)), ConvNet(1, 3, 8, width=8)
    whole = RepresentativeSampler(data, 6)(net, data.class_batch(), Key(0))
    monkeypatch.setattr('dreamplus.choose.samplers.class_parts', lambda split, ids, most: ([c] for c in ids))
    assert torch.equal(RepresentativeSampler(data, 6)(net, data.class_batch(), Key(0)), whole)

def test_parts_keep_the_order_and_the_limit():
    data = unequal((40, 30, 35))
    data.train.counts = [2**14, 2**14, 1]
    assert [*class_parts(data.train)] == [[0, 1], [2]] and [*class_parts(data.train, [2, 0, 1])] == [[2, 0], [1]]
    assert [*class_parts(data.train, most=9)] == [[0, 1, 2]]

@pytest.mark.parametrize('make, says', [
    (lambda d: RandomSampler(d, 0), 'batch_real=0 must be at least 1'),
    (lambda d: RepresentativeSampler(d, 0), 'm=0 must be at least 1'),
    (lambda d: RepresentativeSampler(d, 8, subsample=3), 'batch_real=8 is not a multiple of subsample=3'),
    (lambda d: RepresentativeSampler(d, 8, rule='all'), "rule='all' is unknown"),
    (lambda d: RepresentativeSampler(d, 8, candidates=7), 'candidates=7 is below batch_real=8'),
    (lambda d: SubclusterSampler(d, 8, subsample=1), 'subsample=1 must be at least 2'),
    (lambda d: SAMPLERS.find('rnadom'), "did you mean 'random'"),
    (lambda d: coreset('random', d, 4), "class '1' has 3")])
def test_errors_come_before_any_work(make, says):
    with pytest.raises(ValueError) as e: make(unequal(COUNTS))
    assert says in str(e.value)

def test_gradient_norms():
    net, x, y = ConvNet(3, 4, 8, width=8), torch.randn(5, 3, 8, 8), torch.tensor([0, 3, 1, 1, 2])
    for i, norm in enumerate(gradient_norms(net, x, y)):
        loss = torch.nn.functional.cross_entropy(net(x[i:i + 1]), y[i:i + 1])
        grads = torch.autograd.grad(loss, net.parameters())
        torch.testing.assert_close(norm, sum((g**2).sum() for g in grads).sqrt())

# Coresets

def slow_herding(points, n):
    mean, total, picks = points.mean(0), torch.zeros_like(points[0]), []
    for k in range(n):
        left = [i for i in range(len(points)) if i not in picks]
        picks.append(min(left, key=lambda i: square(points[i], (k + 1)*mean - total)))
        total = total + points[picks[-1]]
    return picks

def slow_k_center(points, n):
    picks = slow_herding(points, 1)
    for _ in range(n - 1):
        left = [i for i in range(len(points)) if i not in picks]
        picks.append(max(left, key=lambda i: min(square(points[i], points[p]) for p in picks)))
    return picks

@pytest.mark.parametrize('name, slow', [('herding', slow_herding), ('k-center', slow_k_center)])
def test_greedy_coresets(name, slow):
    x, mask = cloud()
    assert CORESETS[name](x, mask, 7).tolist() == [slow(x[c][mask[c]], 7) for c in range(3)]

@pytest.mark.parametrize('name', CORESETS)
@pytest.mark.parametrize('channels', [1, 3])
def test_coresets_are_of_their_class(name, channels):
    data = unequal([12, 4, 9], channels=channels)
    for net in None, ConvNet(channels, 3, 8, width=8):
        found = coreset(name, data, 4, net, key=Key(0))
        assert found.shape == (3, 4) and (data.train.y[found] == torch.arange(3)[:, None]).all()
        assert torch.equal(coreset(name, data, 4, net, key=Key(0)), found)
        if name in ('random', 'first', 'herding', 'k-center'): assert all(len(row.unique()) == 4 for row in found)
    if name == 'first': assert found.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15], [16, 17, 18, 19]]

def test_identical_images_are_still_different_picks():
    x = torch.ones(1, 6, 3)
    for name in 'herding', 'k-center':
        assert len(CORESETS[name](x, torch.ones(1, 6, dtype=torch.bool), 6).unique()) == 6
