"Augmentation against slow oracles, and its ranges over many draws."
import math

import pytest
import torch
import torch.nn.functional as F

from dreamplus.core import Key, seeded
from dreamplus.nets.augment import OPS, Augment, augmentation, cutmix

N = 4000
COLORS = 'brightness', 'saturation', 'contrast'

def draw(ops, size=32, n=N, **kw):
    with seeded(0): return Augment(ops, **kw.pop('init', {})).draw(n, size, **kw)

def angles(matrix): return torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])*180/math.pi

@pytest.mark.parametrize('name, lo, hi', [('brightness', -.5, .5), ('saturation', 0, 2), ('contrast', .5, 1.5)])
def test_color_range(name, lo, hi):
    p = draw('color')[name]
    assert lo <= p.min() < lo + .01*(hi - lo) and hi - .01*(hi - lo) < p.max() <= hi
    assert abs(p.mean() - (lo + hi)/2) < .02*(hi - lo)

def test_flip_is_a_fair_coin():
    sign = draw('flip')['matrix'][:, 0, 0]
    assert set(sign.tolist()) == {-1, 1} and abs(sign.mean()) < .05

@pytest.mark.parametrize('size, most', [(8, 1), (28, 4), (32, 4), (64, 8), (224, 28)])
def test_crop_range(size, most):
    shift = draw('crop', size)['matrix'][:, :, 2]*size/2
    torch.testing.assert_close(shift, shift.round(), atol=1e-4, rtol=0)
    count = torch.bincount((shift.round().long() + most).flatten(), minlength=2*most + 1)
    assert len(count) == 2*most + 1 and count.min() > .7*2*N/(2*most + 1)

def test_scale_range():
    both = draw('scale')['matrix'].diagonal(dim1=1, dim2=2)
    assert 1/1.2 <= both.min() < .84 and 1.19 < both.max() <= 1.2
    assert abs(torch.corrcoef(both.T)[0, 1]) < .05

def test_rotate_range():
    m = draw('rotate')['matrix']
    assert 14.9 < angles(m).max() <= 15.001 and -15.001 <= angles(m).min() < -14.9
    torch.testing.assert_close(m[:, :, :2]@m[:, :, :2].mT, torch.eye(2).expand(N, 2, 2))

@pytest.mark.parametrize('size, last', [(32, 32), (28, 28), (9, 8)])
def test_hole_range(size, last):
    hole = draw('cutout', size)['hole']
    assert hole.min() == 0 and hole.max() == last and len(hole.unique()) == last + 1

@pytest.mark.parametrize('size', [8, 9, 28, 32])
def test_cutout_against_clamped_indices(size):
    side, p = int(.5*size + .5), draw('cutout', size, n=50)
    out = Augment('cutout')(torch.ones(50, 1, size, size), p)
    for image, (row, col) in zip(out, p['hole'].tolist()):
        slow = torch.ones(1, size, size)
        for i in range(row - side//2, row - side//2 + side):
            for j in range(col - side//2, col - side//2 + side):
                slow[:, min(max(i, 0), size - 1), min(max(j, 0), size - 1)] = 0
        assert torch.equal(image, slow)

@pytest.mark.parametrize('size, eps', [(8, 1e-6), (28, 1e-5), (32, 1e-6), (64, 1e-6), (224, 1e-4)])
def test_crop_is_the_integer_shift(size, eps):
    "Coordinates that are no binary fractions round in float32; what it costs grows with the size"
    most, n = int(.125*size + .5), 12
    x, p = torch.rand(n, 2, size, size)*2 - 1, draw('crop', size, n=n)
    shift = (p['matrix'][:, :, 2]*size/2).round().long()
    starts = zip(F.pad(x, (most,)*4), most + shift)
    slow = torch.stack([i[:, dy:dy + size, dx:dx + size] for i, (dx, dy) in starts])
    torch.testing.assert_close(Augment('crop')(x, p), slow, atol=eps, rtol=0)

def test_whole_stack_against_one_image_at_a_time():
    "flip, then the three colours, then the warp through torch's own affine_grid, then cutout"
    ops = 'flip_color_crop_scale_rotate_cutout'
    p, n = draw(ops, n=40), 40
    x = torch.randn(n, 3, 32, 32, dtype=torch.float64)
    fast = Augment(ops)(x, p)
    for i in range(n):
        b, s, k = (p[name][i].double() for name in COLORS)
        matrix = p['matrix'][i:i + 1].double()
        flipped = matrix[0, 0, 0] < 0
        y = x[i:i + 1].flip(-1) if flipped else x[i:i + 1]
        y = y + b
        grey = y.mean(1, keepdim=True)
        y = (y - grey)*s + grey
        mean = y.mean()
        y = (y - mean)*k + mean
        if flipped: matrix = matrix*torch.tensor([[-1.], [1.]])
        y = F.grid_sample(y, F.affine_grid(matrix, y.shape, align_corners=False), align_corners=False)
        y = Augment('cutout')(y, dict(hole=p['hole'][i:i + 1]))
        torch.testing.assert_close(fast[i:i + 1], y, atol=1e-10, rtol=0)

def warps(matrix):
    "Which of crop, scale, rotate each matrix is, or none"
    identity = torch.eye(2, 3)
    cropped = (matrix[:, :, 2] != 0).any(1)
    rotated = matrix[:, 1, 0] != 0
    scaled = (matrix.diagonal(dim1=1, dim2=2) != 1).any(1) & ~rotated
    return torch.stack([cropped, scaled, rotated, (matrix == identity).all(2).all(1)], 1)

def test_stack_picks_one_warp():
    w = warps(draw('color_crop_scale_rotate')['matrix'])
    assert (w.sum(1) == 1).all()
    # a crop by nothing in both directions, one of 81, looks like none
    torch.testing.assert_close(w.float().mean(0), torch.tensor([80/243, 1/3, 1/3, 1/243]), atol=.03, rtol=0)

def test_one_picks_one_of_all():
    p = draw('_'.join(OPS), init=dict(pick='one'))
    flipped = p['matrix'][:, 0, 0] < 0
    unflip = torch.where(flipped[:, None, None], torch.tensor([[-1.], [1.]]), 1.)
    on = torch.stack([p['contrast'] != 1, flipped, *warps(p['matrix']*unflip)[:, :3].unbind(1),
                      p['hole'][:, 0] >= 0], 1)
    assert on.sum(1).max() == 1
    share = torch.tensor([1, 1/2, 80/81, 1, 1, 1])/6 # a flip is drawn but not done half of the time
    torch.testing.assert_close(on.float().mean(0), share, atol=.02, rtol=0)
    assert ((p['brightness'] != 0) == on[:, 0]).all() and ((p['saturation'] != 1) == on[:, 0]).all()

def test_same_op_is_one_choice_with_independent_parameters():
    for seed in range(10):
        with seeded(seed): m = Augment('crop_scale_rotate').draw(200, 32, same_op=True)['matrix']
        w = warps(m)[:, :3]
        assert w.any(0).sum() == 1 and len(m.unique(dim=0)) > 50

def test_keyed_draws_have_the_same_distribution():
    key = Key(0, 'draw', rows=torch.arange(N))
    ops = 'color_crop_scale_rotate_cutout_flip'
    keyed, other = (Augment(ops).draw(N, 32, key=k) for k in (key, None))
    for name, p in keyed.items():
        p, q, off = p.float(), other[name].float(), .35 if name == 'hole' else .03 # a hole is counted in pixels
        torch.testing.assert_close(p.mean(0), q.mean(0), atol=off, rtol=.03)
        torch.testing.assert_close(p.std(0), q.std(0), atol=.02, rtol=.04)

@pytest.mark.parametrize('ops, pick', [('_'.join(OPS), 'stack'), ('_'.join(OPS), 'one'), ('imagenet', 'stack'),
                                       ('stretch_turn_noise', 'stack')])
@pytest.mark.parametrize('same_op', [False, True])
def test_a_row_of_a_key_draws_alone_what_it_draws_among_others(ops, pick, same_op):
    aug, rows = augmentation(ops, pick), torch.arange(12)
    whole = aug.draw(12, 16, same_op=same_op, key=Key(0, 'draw', rows=rows))
    part = aug.draw(5, 16, same_op=same_op, key=Key(0, 'draw', rows=rows[7:]))
    assert all(torch.equal(part[name], whole[name][7:]) for name in whole)
    other = aug.draw(12, 16, same_op=same_op, key=Key(1, 'draw', rows=rows))
    assert any(not torch.equal(other[name], whole[name]) for name in whole)

def test_unlisted_operations_draw_nothing():
    assert set(draw('color', n=2)) == set(COLORS)
    assert set(draw('crop_flip', n=2)) == {'matrix'}
    assert draw('', n=2) == {}

@pytest.mark.parametrize('pick', ['stack', 'one'])
@pytest.mark.parametrize('channels, size', [(1, 8), (2, 9), (3, 28)])
def test_any_shape_and_dtype(pick, channels, size):
    aug = Augment('_'.join(OPS), pick)
    p = aug.draw(3, size)
    for shape in (3, channels, size, size), (3, 2, channels, size, size):
        for dtype in torch.float32, torch.float64:
            x = torch.randn(shape, dtype=dtype)
            assert aug(x, p).shape == x.shape and aug(x, p).dtype == dtype
            assert torch.isfinite(aug(x, p)).all()
    x = torch.randn(3, 2, channels, size, size)
    torch.testing.assert_close(aug(x, p)[:, 1], aug(x[:, 1], p))
    torch.testing.assert_close(aug(x.mT, p), aug(x.mT.contiguous(), p)) # not contiguous

def test_input_is_left_alone():
    x = torch.randn(2, 3, 8, 8)
    before, aug = x.clone(), Augment('_'.join(OPS))
    aug(x, aug.draw(2, 8)), cutmix(x, torch.arange(2), 1)
    assert torch.equal(x, before)

def test_cutmix_against_a_loop():
    size, n, weights = 16, 5, []
    x, y = torch.rand(n, 2, size, size) + torch.arange(n)[:, None, None, None], torch.arange(n) # images are told apart
    for seed in range(200):
        with seeded(seed): mixed, y2, weight = cutmix(x, y, .5)
        with seeded(seed):
            gate, lam = torch.rand(2).tolist()
            row, col = torch.randint(size, (2, 1)).flatten().tolist()
            partner = torch.randperm(n)
        side = int(size*math.sqrt(1 - lam)) if gate < .5 else 0
        slow = x.clone()
        top, bottom = (min(max(row + d, 0), size) for d in (-(side//2), side//2))
        left, right = (min(max(col + d, 0), size) for d in (-(side//2), side//2))
        slow[:, :, top:bottom, left:right] = x[partner][:, :, top:bottom, left:right]
        assert torch.equal(mixed, slow) and torch.equal(y2, y[partner])
        assert weight.item() == pytest.approx(1 - (bottom - top)*(right - left)/size**2, abs=1e-6)
        weights.append(weight.item())
    assert 80 <= sum(w < 1 for w in weights) <= 115 # half of the batches, less the boxes without area

def test_cutmix_gradient_goes_to_the_owner_of_each_pixel():
    x = torch.randn(4, 1, 8, 8, requires_grad=True)
    with seeded(8): mixed, y2, weight = cutmix(x, torch.eye(4), 1)
    mixed.sum().backward()
    assert y2.shape == (4, 4) and x.grad.sum() == mixed.numel() and not weight.requires_grad

@pytest.mark.parametrize('pick', ['stack', 'one'])
def test_nothing_looks_at_values(pick):
    "The meta device has no values: a sync, a branch on a tensor or a boolean index would fail there"
    aug, x = Augment('_'.join(OPS), pick), torch.empty(4, 2, 3, 32, 32, device='meta')
    key = Key(0, 'draw', rows=torch.empty(4, dtype=torch.int64, device='meta'))
    for same_op in True, False:
        for k in None, key: assert aug(x, aug.draw(4, 32, 'meta', same_op, k)).shape == x.shape
    mixed, y2, weight = cutmix(x[:, 0], torch.empty(4, dtype=torch.int64, device='meta'), .5)
    assert mixed.shape == x[:, 0].shape and y2.shape == (4,) and weight.shape == ()
