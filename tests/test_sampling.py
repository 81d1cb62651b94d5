"Clusters, picks, samplers and coresets against slow oracles: one class, one point, one centre at a time, in float64."
import pytest
import torch
from sklearn.cluster import KMeans

from dreamplus import sampling
from dreamplus.core import load_state, rng_state, save_state, seeded, set_rng_state, toy_images
from dreamplus.nets.convnet import ConvNet
from dreamplus.data.sources import load_data
from dreamplus.choose.kmeans import (CORESETS, RandomSampler, RepresentativeSampler, class_table, coreset, embed_classes,
                                gradient_norms, kmeans, nearest, representatives)

@pytest.fixture(autouse=True)
def _seed():
    with seeded(0): yield

def unequal(counts, size=8, channels=1):
    "Data of as many classes as `counts`, with so many images each"
    x, y = toy_images(len(counts), max(counts), size, channels)
    keep = torch.cat([torch.arange(n) + c*max(counts) for c, n in enumerate(counts)])
    return load_data((x[keep], y[keep]), test=(x, y))

def cloud(counts=(40, 7, 23), dim=5):
    "Points (C,N,D) in float64 and their mask; what the mask hides is far away"
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    x = torch.randn(*mask.shape, dim, dtype=torch.float64)
    return x.masked_fill(~mask[..., None], 1e3), mask

def square(a, b): return sum((p - q)**2 for p, q in zip(a.tolist(), b.tolist()))

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

@pytest.mark.parametrize('k', [1, 3, 6])
@pytest.mark.parametrize('chunk', [None, 2, 3])
def test_kmeans_is_lloyds_algorithm(k, chunk):
    x, mask = cloud()
    state = rng_state()
    found = kmeans(x, k, mask, chunk=chunk)
    set_rng_state(state)
    begin = sampling._shuffle(mask, k)
    for c in range(3):
        points = x[c][mask[c]]
        slow = slow_kmeans(points, x[c][begin[c]])
        torch.testing.assert_close(found.centres[c], slow)
        d = torch.tensor([[square(p, q) for q in slow] for p in points], dtype=torch.float64)
        assert found.labels[c][mask[c]].tolist() == d.argmin(1).tolist()
        torch.testing.assert_close(found.distance[c][mask[c]], d.min(1)[0])

def test_kmeans_stops_by_the_sum_of_squared_movement():
    "and a class that is done waits for the others without moving"
    x, mask = cloud((150, 20, 60), dim=3)
    start = sampling._take(x, sampling._shuffle(mask, 4))
    for tol in 0, .01, .1, 1:
        together = sampling._lloyd(x, mask, start, 100, tol)
        for c in range(3):
            torch.testing.assert_close(together.centres[c], slow_kmeans(x[c][mask[c]], start[c], tol=tol))
    assert sampling._lloyd(x, mask, start, 2, 0).rounds == 2

def test_empty_clusters_restart_at_the_farthest_points():
    x, mask = cloud()
    start = x[:, :1].expand(-1, 5, -1) # all at one place: four of five are empty
    found = sampling._lloyd(x, mask, start, 100, 1e-4)
    for c in range(3):
        assert len(found.labels[c][mask[c]].unique()) == 5
        torch.testing.assert_close(found.centres[c], slow_kmeans(x[c][mask[c]], start[c]))

def test_more_clusters_than_points():
    x, mask = cloud((12, 3))
    found = kmeans(x, 8, mask)
    assert found.centres[1].abs().max() < 100 # no centre went to what the mask hides
    torch.testing.assert_close(found.distance[1][:3], torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)

def test_identical_points():
    for start in 'sample', '++':
        found = kmeans(torch.ones(2, 10, 3), 4, start=start)
        assert found.distance.max() == 0 and found.rounds <= 2

@pytest.mark.parametrize('start', ['sample', '++'])
def test_inertia_is_scikit_learns(start):
    "within one per cent of its best of three starts"
    x = torch.randn(24, 600, 8)
    ours = torch.stack([kmeans(x, 10, start=start).distance.sum(1) for _ in range(3)]).min(0)[0].sum()
    assert ours < 1.01*sum(KMeans(10, n_init=3, random_state=0).fit(p).inertia_ for p in x.numpy())

def test_plusplus_finds_separate_blobs():
    centres = torch.eye(12)*20
    x = (centres.repeat_interleave(9, 0) + torch.randn(108, 12))[None].repeat(3, 1, 1)
    begin = sampling._plusplus(x, torch.ones(3, 108, dtype=torch.bool), 12)
    assert all(sorted(row) == list(range(12)) for row in (begin//9).tolist())

def test_starts_lie_under_the_mask():
    x, mask = cloud((30, 2, 9))
    for begin in sampling._shuffle(mask, 9), sampling._plusplus(x, mask, 9):
        assert mask.gather(1, begin).all()
    assert [len(row.unique()) for row in sampling._shuffle(mask, 9)] == [9, 2, 9]

def test_sampled_starts_are_uniform_and_without_replacement():
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None]
    draws = torch.stack([sampling._shuffle(mask, 3) for _ in range(2000)]) # (2000,2,3)
    assert all(len(row.unique()) == 3 for row in draws[:50].flatten(0, 1))
    for c, n in enumerate((6, 4)):
        share = torch.bincount(draws[:, c].flatten(), minlength=6)/2000
        torch.testing.assert_close(share, (torch.arange(6) < n)*3/n, atol=.06, rtol=0)

def test_chunks_draw_the_same():
    x = torch.randn(5, 30, 4)
    found = []
    for chunk in 1, 2, 5:
        with seeded(1): found.append(kmeans(x, 6, chunk=chunk).centres)
    for f in found[1:]: torch.testing.assert_close(f, found[0])

# Picks

@pytest.mark.parametrize('s', [1, 2, 3])
def test_nearest_by_brute_force(s):
    x, mask = cloud()
    x = x.masked_fill(~mask[..., None], 0) # in the middle, where they would be nearest
    centres = torch.randn(3, 4, 5, dtype=torch.float64)
    picks = nearest(x, centres, mask, s)
    assert picks.tolist() == [slow_picks(x[c][mask[c]], centres[c], s) for c in range(3)]

def test_nearest_repeats_a_class_that_is_too_small():
    x, mask = cloud((9, 2))
    picks = nearest(x, torch.zeros(2, 3, 5, dtype=torch.float64), mask, s=5).view(2, 3, 5)
    order = slow_picks(x[1][:2], torch.zeros(1, 5), 2)
    assert picks[1].tolist() == [(order*3)[:5]]*3
    assert len(picks[0, 0].unique()) == 5

@pytest.mark.parametrize('m, s', [(6, 1), (6, 2), (6, 3)])
def test_representatives_against_the_specification(m, s):
    "by distance, since a centre in the middle of two points is as far from the one as from the other"
    x, mask = cloud()
    with seeded(3): picks = representatives(x, m, mask, s=s)
    with seeded(3): begin = sampling._shuffle(mask, m//s)
    for c in range(3):
        points = x[c][mask[c]]
        centres = slow_kmeans(points, x[c][begin[c]])
        slow, ours = slow_picks(points, centres, s), picks[c].tolist()
        ours, slow = ([square(points[i], centres[j//s]) for j, i in enumerate(found)] for found in (ours, slow))
        assert ours == pytest.approx(slow)

def test_tiny_takes_the_nearest_to_any_centre():
    x, mask = cloud((40, 4, 23))
    with seeded(3): picks = representatives(x, 6, mask, rule='tiny')
    with seeded(3): begin = sampling._shuffle(mask, 6)
    for c in 0, 2:
        points = x[c][mask[c]]
        centres = slow_kmeans(points, x[c][begin[c]])
        own = [min(square(p, q) for q in centres) for p in points]
        assert picks[c].tolist() == sorted(range(len(points)), key=own.__getitem__)[:6]
    assert mask.gather(1, picks).all() and len(picks[1].unique()) == 4

def test_embeddings_are_those_of_each_image():
    data = unequal([9, 3, 5], channels=3)
    net = ConvNet(3, 3, 8, width=8).requires_grad_(False)
    for raw in False, True:
        e, mask = embed_classes(net, data, raw=raw, batch=4)
        assert mask.sum(1).tolist() == data.train.counts == [9, 3, 5]
        for c in range(3):
            x = data.train.x[data.train.y == c].float()/255
            if not raw: x = (x - data.mean)/data.std
            torch.testing.assert_close(e[c][mask[c]], torch.stack([net.embed(i[None])[0] for i in x]))

# Samplers

COUNTS = [10, 3, 7]

@pytest.mark.parametrize('batch', [1, 3, 4, 7, 10, 25])
def test_random_sampler_is_a_stream_for_each_class(batch):
    "A pass shows nothing twice and drops its tail; a small class comes whole, as evenly as can be"
    data = unequal(COUNTS)
    sampler = RandomSampler(data, batch)
    calls = torch.stack([sampler() for _ in range(40)]) # (40,C,B)
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
        assert len(torch.cat(passes).unique()) == n # what a tail dropped comes in another pass

def test_random_sampler_goes_on_where_it_was(tmp_path):
    data = unequal(COUNTS)
    sampler = RandomSampler(data, 2)
    for _ in range(4): sampler()
    save_state(tmp_path/'s', dict(sampler=sampler.state_dict(), rng=rng_state()))
    expected = [sampler() for _ in range(12)]
    other, state = RandomSampler(data, 2), load_state(tmp_path/'s')
    other.load_state_dict(state['sampler'])
    set_rng_state(state['rng'])
    for e in expected: assert torch.equal(other(), e)

def test_representative_sampler():
    data, net = unequal(COUNTS), ConvNet(1, 3, 8, width=8)
    for rule, s in ('nearest', 1), ('nearest', 2), ('tiny', 1):
        sampler = RepresentativeSampler(data, 6, rule=rule, s=s)
        with seeded(5): found = sampler(net)
        assert (data.train.y[found] == torch.arange(3)[:, None]).all() and found.shape == (3, 6)
        with seeded(5): picks = representatives(*embed_classes(net, data)[:1], 6, class_table(data.train)[1], rule, s)
        assert torch.equal(found, class_table(data.train)[0].gather(1, picks))
    assert sampler.interval == 10

def test_warm_start():
    "A sampler for the same network starts from its last clusters, which its state brings back; another starts anew"
    data, net = unequal((40, 30, 35)), ConvNet(1, 3, 8, width=8)
    sampler = RepresentativeSampler(data, 6)
    with seeded(5): sampler(net)
    again = RepresentativeSampler(data, 6)
    again.load_state_dict(sampler.state_dict())
    x, mask = embed_classes(net, data)
    with seeded(7): found = kmeans(x, 6, mask, start=sampler.labels['0'].long(), max_iter=10)
    with seeded(7): expected = class_table(data.train)[0].gather(1, nearest(x, found.centres, mask))
    with seeded(7): assert torch.equal(again(net, fresh=False), expected)
    with seeded(7): anew = RepresentativeSampler(data, 6)(net)
    with seeded(7): assert torch.equal(again(net, fresh=True), anew) and not torch.equal(anew, expected)

def test_candidates():
    "A choice is the representatives of the candidates, who are others for another network; a small class is all there"
    data, net = unequal((40, 5, 35)), ConvNet(1, 3, 8, width=8)
    sampler, groups = RepresentativeSampler(data, 4, candidates=9), []
    for fresh in True, False, True:
        with seeded(len(groups)): found = sampler(net, fresh)
        groups.append(sampler.at.split([9, 5, 9]))
        assert torch.equal(groups[-1][1].sort().values, torch.arange(40, 45))
        for c, (at, picks) in enumerate(zip(groups[-1], found)):
            assert (data.train.y[at] == c).all() and len(at.unique()) == len(at) and torch.isin(picks, at).all()
            assert torch.equal(sampler.seen.train.x[sampler.seen.train.starts[c]], data.train.x[at[0]])
    assert torch.equal(torch.cat(groups[0]), torch.cat(groups[1])) # the same network, trained on
    assert not torch.equal(torch.cat(groups[0]), torch.cat(groups[2]))
    x = net.embed(data.normalize(data.train.x[groups[2][0]].float()/255))[None]
    sampler.labels = {}
    with seeded(5): picks = sampler(net, fresh=False)[0] # anew, for want of labels, among the same
    with seeded(5): expected = representatives(torch.cat([x]*3), 4)[0]
    assert torch.equal(picks, groups[2][0][expected])
    assert sampler.seen.train.x.pixels is data.train.x # listed, not copied

def test_candidates_are_in_the_state(tmp_path):
    data, net = unequal((40, 5, 35)), ConvNet(1, 3, 8, width=8)
    sampler, again = (RepresentativeSampler(data, 4, candidates=9) for _ in range(2))
    again.load_state_dict(sampler.state_dict()) # of a run that has not begun
    sampler(net)
    save_state(tmp_path/'s', dict(sampler=sampler.state_dict(), rng=rng_state()))
    expected = [sampler(net, fresh) for fresh in (False, True, False)]
    state = load_state(tmp_path/'s')
    again.load_state_dict(state['sampler'])
    set_rng_state(state['rng'])
    for fresh, e in zip((False, True, False), expected): assert torch.equal(again(net, fresh), e)

def test_parts_of_classes(monkeypatch):
    "Classes that go through in parts are chosen from as all at once, but for the draws"
    data, net = unequal((40, 30, 35)), ConvNet(1, 3, 8, width=8)
    sampler = RepresentativeSampler(data, 6)
    sampler.parts = [slice(0, 2), slice(2, 3)]
    found = sampler(net)
    assert (data.train.y[found] == torch.arange(3)[:, None]).all() and sorted(sampler.labels) == ['0', '2']

@pytest.mark.parametrize('make, says', [
    (lambda d: RandomSampler(d, 0), 'batch=0 must be at least 1'),
    (lambda d: RepresentativeSampler(d, 0), 'm=0 must be at least 1'),
    (lambda d: RepresentativeSampler(d, 8, s=3), 'm=8 is not a multiple of s=3'),
    (lambda d: RepresentativeSampler(d, 8, s=0), 'm=8 is not a multiple of s=0'),
    (lambda d: RepresentativeSampler(d, 8, rule='all'), "rule='all' is unknown"),
    (lambda d: RepresentativeSampler(d, 8, candidates=7), 'candidates=7 is below batch=8'),
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
    picks = CORESETS[name](x, mask, 7)
    assert picks.tolist() == [slow(x[c][mask[c]], 7) for c in range(3)]

@pytest.mark.parametrize('name', CORESETS)
@pytest.mark.parametrize('channels', [1, 3])
def test_coresets_are_of_their_class(name, channels):
    data = unequal([12, 4, 9], channels=channels)
    for net in None, ConvNet(channels, 3, 8, width=8):
        found = coreset(name, data, 4, net)
        assert found.shape == (3, 4) and (data.train.y[found] == torch.arange(3)[:, None]).all()
        if name in ('random', 'first', 'herding', 'k-center'): assert all(len(row.unique()) == 4 for row in found)
    if name == 'first': assert found.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15], [16, 17, 18, 19]]

def test_identical_images_are_still_different_picks():
    x = torch.ones(1, 6, 3)
    for name in 'herding', 'k-center':
        assert len(CORESETS[name](x, torch.ones(1, 6, dtype=torch.bool), 6).unique()) == 6
