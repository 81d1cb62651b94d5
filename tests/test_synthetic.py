"Cells, decoding, mosaics and starts against the specification, one image and one cell at a time; and what is kept."
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamplus.core import Key, read_json, save_state, toy_images, write_json
from dreamplus.data.sources import load_data
from dreamplus.distilled import DistilledSet, load_distilled, picture
from dreamplus.synthetic import DECODES, SyntheticSet, check_start, cut, decode, decode_classes, mosaic, start_pixels

def unequal(counts, size=8, channels=1):
    x, y = toy_images(len(counts), max(counts), size, channels)
    keep = torch.cat([torch.arange(n) + c*max(counts) for c, n in enumerate(counts)])
    return load_data((x[keep], y[keep]), test=(x, y))

# The oracle: what the specification says of one image

def bilinear(side, size):
    "A matrix (size,side) that enlarges by linear interpolation between pixel centres"
    m = torch.zeros(size, side, dtype=torch.float64)
    for i in range(size):
        at = max((i + .5)*side/size - .5, 0)
        low = min(math.floor(at), side - 1)
        m[i, low] += 1 - (at - low)
        m[i, min(low + 1, side - 1)] += at - low
    return m

def bicubic(side, size):
    "The same with the cubic kernel whose parameter is -3/4; pixels outside are those of the border"
    m, a = torch.zeros(size, side, dtype=torch.float64), -.75
    for i in range(size):
        at = (i + .5)*side/size - .5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            d = abs(at - j)
            near, far = (a + 2)*d**3 - (a + 3)*d**2 + 1, a*d**3 - 5*a*d**2 + 8*a*d - 4*a
            m[i, min(max(j, 0), side - 1)] += near if d <= 1 else far
    return m

def slow_enlarge(cell, size, mode): # (ch,a,a) -> (ch,size,size)
    up = (bicubic if mode in ('bicubic', 'sharp') else bilinear)(cell.shape[-1], size)
    out = up@cell@up.T
    if mode == 'sharp': out = .5 + 2*(out - .5)
    return out.clamp(0, 1) if mode in ('bicubic', 'sharp') else out

def slow_cells(image, f, mode='single'): # (ch,h,w) -> f*f images of the same size, row by row
    ch, size, _ = image.shape
    side = math.ceil(size/f)
    padded = torch.full((ch, side*f, side*f), .5, dtype=image.dtype)
    padded[:, :size, :size] = image
    if f == 1: return [image]
    return [slow_enlarge(padded[:, r*side:(r + 1)*side, c*side:(c + 1)*side], size, mode)
            for r in range(f) for c in range(f)]

def slow_cut(images, f, mode='single'): # all first cells, then all second cells
    cells = [slow_cells(i, f, mode) for i in images]
    return [own[k] for k in range(f*f) for own in cells]

def slow_bound(images, f, limit=128):
    out, budget = [], list(images)
    slack = limit - len(budget)
    for g in range(f, 0, -1):
        m = len(budget) if g == 1 else max(0, min(slack//g**2, len(budget)))
        out += slow_cut(budget[:m], g)
        budget = budget[m:]
        slack = limit - len(out) - len(budget)
        if not budget: break
    return out

def slow_decode(images, f, mode):
    if mode in ('single', 'bicubic', 'sharp'): return slow_cut(images, f, mode)
    if mode == 'multi': return [i for g in range(1, f + 1) for i in slow_cut(images, g)]
    return slow_bound(images, f)

# Decoding

@pytest.mark.parametrize('size, channels, f', [(8, 1, 1), (8, 3, 2), (8, 1, 3), (9, 3, 3), (7, 1, 2), (11, 3, 4)])
def test_cut(size, channels, f):
    x = torch.rand(2, 3, channels, size, size, dtype=torch.float64)
    slow = torch.stack([torch.stack(slow_cut(images, f)) for images in x])
    torch.testing.assert_close(cut(x, f), slow)
    torch.testing.assert_close(cut(x[1], f), slow[1]) # without a class axis
    torch.testing.assert_close(cut(x[None], f), slow[None]) # and with more

def test_the_worked_case_of_the_specification():
    "32 pixels by three: one of padding, cells of eleven, nine images"
    x = torch.zeros(1, 1, 1, 32, 32)
    out = cut(x, 3)
    assert out.shape == (1, 9, 1, 32, 32)
    padded = [k for k in range(9) if out[0, k].any()]
    assert padded == [2, 5, 6, 7, 8] # the cells at the right and at the bottom
    assert out[0, 2, 0, :, -1].eq(.5).all() and out[0, 6, 0, -1].eq(.5).all()

@pytest.mark.parametrize('mode, n, f', [
    ('single', 1, 3), ('single', 10, 2), ('multi', 1, 3), ('multi', 7, 3), ('bicubic', 1, 3), ('bicubic', 10, 2),
    ('sharp', 1, 3), ('sharp', 10, 2), # below, at and above the limit of `bound`:
    *[('bound', n, f) for n, f in ((1, 3), (20, 3), (50, 3), (40, 2), (128, 3), (140, 2))]])
def test_decode(mode, n, f):
    x = torch.rand(1, n, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(decode(x, f, mode)[0], torch.stack(slow_decode(x[0], f, mode)))

@pytest.mark.parametrize('mode', DECODES)
def test_classes_of_different_sizes(mode):
    "are decoded one after the other, and every decoded image knows which stored image it comes from"
    x, counts = torch.rand(7, 1, 5, 5, dtype=torch.float64), [2, 4, 1]
    images, places = decode_classes(x, counts, 2, mode)
    slow = [slow_decode(list(part), 2, mode) for part in x.split(counts)]
    torch.testing.assert_close(images, torch.stack(sum(slow, [])))
    grey = (.3 + torch.arange(7.)/20).view(-1, 1, 1, 1).expand(-1, -1, 4, 4) # an image of each grey
    shown = decode_classes(grey, counts, 2, mode)[0][:, 0, 0, 0]
    assert torch.equal((shown*1000).round().unique(return_inverse=True)[1], places)

@pytest.mark.parametrize('f', [1, 2, 3, 4, 5])
def test_bound_never_shows_more_than_its_limit(f):
    for n in range(1, 150, 7):
        shown = decode(torch.zeros(1, n, 1, 5, 5), f, 'bound').shape[1]
        assert n <= shown <= max(128, n) and shown <= n*f*f

# Mosaics and starts

def slow_mosaic(sources, n, f): # n*f*f images (ch,h,w) -> n
    size = sources[0].shape[-1]
    sides = [size//f + 1]*(size % f) + [size//f]*(f - size % f)
    out = [torch.full_like(sources[0], -1) for _ in range(n)]
    for k in range(f*f):
        r, c = divmod(k, f)
        top, left = sum(sides[:r]), sum(sides[:c])
        for j in range(n):
            for y in range(sides[r]):
                for x in range(sides[c]):
                    nearest = sources[k*n + j][:, y*size//sides[r], x*size//sides[c]]
                    out[j][:, top + y, left + x] = nearest
    return out

@pytest.mark.parametrize('size, channels, n, f',
                         [(8, 1, 1, 1), (8, 3, 2, 2), (8, 1, 3, 3), (9, 3, 1, 2), (11, 1, 2, 4)])
def test_mosaic(size, channels, n, f):
    x = torch.rand(2, n*f*f, channels, size, size)
    slow = torch.stack([torch.stack(slow_mosaic(list(images), n, f)) for images in x])
    assert torch.equal(mosaic(x, f), slow)

@pytest.mark.parametrize('mode', ['bicubic', 'sharp'])
@pytest.mark.parametrize('size, channels, n, f', [(8, 1, 1, 1), (8, 3, 2, 2), (9, 1, 2, 3), (11, 1, 2, 4)])
def test_fitted_mosaic(size, channels, n, f, mode):
    "no other cell is nearer to its image; what lies outside the stored image is cut off"
    x, side = torch.rand(2, n*f*f, channels, size, size, dtype=torch.float64)*.2 + .4, math.ceil(size/f)
    stored, up, contrast = mosaic(x, f, mode), bicubic(side, size), 2 if mode == 'sharp' else 1
    if f == 1:
        assert torch.equal(stored, x)
        return
    for k, j in ((k, j) for k in range(f*f) for j in range(n)):
        top, left = k//f*side, k % f*side
        target = (x[:, k*n + j] - .5)/contrast + .5
        rows = torch.linalg.lstsq(up.expand(2, channels, -1, -1), target).solution # one axis after the other
        cell = torch.linalg.lstsq(up.expand(2, channels, -1, -1), rows.mT).solution.mT
        ours = stored[:, j, :, top:top + side, left:left + side]
        torch.testing.assert_close(ours, cell.clamp(0, 1)[..., :ours.shape[-2], :ours.shape[-1]])

def test_ways_to_decode_differ_in_detail():
    "the decoded digits are nearer to the real ones with more detail"
    data = load_data('digits', size=28)
    x = data.train.x[:40].float()[None]/255
    errors = [(cut(mosaic(x, 2, mode), 2, mode) - x).square().mean() for mode in ('single', 'bicubic')]
    assert errors[1] < errors[0]/2

@pytest.mark.parametrize('channels', [1, 3])
def test_first_start_is_the_first_images(channels):
    data = unequal([20, 9, 13], channels=channels)
    pixels = start_pixels(data, 2, 2, 'first')
    for c in range(3):
        own = data.train.x[data.train.y == c][:8].float()/255
        assert torch.equal(pixels[c], torch.stack(slow_mosaic(list(own), 2, 2)))

def test_random_start_is_random_and_seeded():
    data = unequal([20, 9, 13])
    draw = {}
    for seed in 0, 0, 1:
        new = start_pixels(data, 3, 1, 'mix', key=Key(seed))
        if seed in draw: assert torch.equal(new, draw[seed])
        draw[seed] = new
        for c in range(3):
            own = data.train.x[data.train.y == c].float()/255
            found = (new[c][:, None] == own).flatten(2).all(2)
            assert found.any(1).all() and len(found.float().argmax(1).unique()) == 3 # of the class, all different
    assert not torch.equal(draw[0], draw[1])

def test_noise_start():
    pixels = start_pixels(unequal([4, 2], size=16, channels=3), 50, 3, 'noise')
    assert pixels.shape == (2, 50, 3, 16, 16) and pixels.min() == 0 and pixels.max() == 1
    assert abs(pixels.mean() - .5) < .01 and abs(pixels.std() - .24) < .01 # 0.25, less what is clamped

@pytest.mark.parametrize('ipc, factor, start, says', [
    (0, 1, 'noise', 'ipc=0 must be at least 1'), (1, 0, 'noise', 'factor=0 must be a whole number from 1 to 4'),
    (1, 5, 'noise', 'factor=5 must be a whole number from 1 to 4'), (1, 1, 'bset', "start='bset' is unknown"),
    (1, 2, 'k-means', "starts from 4 real images per class, but class '1' has 3"),
    (4, 1, 'first', "starts from 4 real images per class, but class '1' has 3")])
def test_what_cannot_be_started(ipc, factor, start, says):
    data = unequal([10, 3])
    for check in check_start, start_pixels:
        with pytest.raises(ValueError) as e: check(data, ipc, factor, start)
        assert says in str(e.value)

@pytest.mark.parametrize('size', [1, 2, 3])
def test_images_too_small_for_a_factor(size):
    with pytest.raises(ValueError, match=f'factor=2 needs images of at least 4 pixels, these have {size};.*size=32'):
        check_start(unequal([10, 3], size), 1, 2, 'noise')
    check_start(unequal([10, 3], size), 1, 1, 'noise')
    check_start(unequal([10, 3], 4), 1, 2, 'noise')

def test_noise_needs_no_images(): check_start(unequal([10, 3]), 100, 4, 'noise')

# The model

@pytest.mark.parametrize('mode', DECODES)
def test_forward_is_the_decoded_classes(mode):
    syn = SyntheticSet(torch.rand(4, 5, 3, 9, 9), None, factor=3, decode=mode)
    out = syn(torch.tensor([2, 0]))
    pixels = syn.pixels.unflatten(0, (4, 5))
    assert torch.equal(out, decode(pixels[[2, 0]], 3, mode).flatten(0, 1))
    out.sum().backward()
    grad = syn.pixels.grad.unflatten(0, (4, 5))
    assert (grad[[0, 2]] > 0).all() and not grad[[1, 3]].any()

def test_forward_of_classes_of_different_sizes():
    "with soft labels: each decoded image has the probabilities of its stored one, and gradients reach both"
    x, soft = torch.rand(6, 1, 5, 5, dtype=torch.float64), torch.eye(3)[[0, 0, 1, 2, 2, 2]]*.7 + .1
    syn, own = SyntheticSet(x, soft, factor=2, label_lr=.1), [x[3:], x[:2]]
    images, probabilities = syn(torch.tensor([2, 0]))
    torch.testing.assert_close(images, torch.cat([torch.stack(slow_cut(part, 2)) for part in own]))
    torch.testing.assert_close(probabilities, soft[[3, 4, 5]*4 + [0, 1]*4])
    assert syn.shown([2, 0]) == [12, 8]
    (images.sum() + probabilities[:, 0].sum()).backward()
    for grad in syn.pixels.grad, syn.logits.grad:
        assert grad[[0, 1, 3, 4, 5]].ne(0).flatten(1).any(1).all() and not grad[2].any()

def test_pixel_gradient_of_decoding():
    x = torch.rand(1, 2, 1, 5, 5, dtype=torch.float64)*.2 + .4 # nothing is clamped
    for mode in DECODES: assert torch.autograd.gradcheck(lambda x, mode=mode: decode(x, 2, mode), x.requires_grad_())

@pytest.mark.parametrize('mode', ['bicubic', 'sharp'])
def test_clamped_pixels_pass_on_their_gradient(mode):
    "so that a black or a white pixel can become grey again"
    x = torch.tensor([0., 1.]).double().view(2, 1, 1, 1).expand(2, 1, 8, 8).clone().requires_grad_()
    out = decode(x, 2, mode)
    assert torch.equal(out.detach(), out.detach().clamp(0, 1))
    weights = torch.rand_like(out)
    (out*weights).sum().backward()
    up, contrast = bicubic(4, 8), 2 if mode == 'sharp' else 1
    for i in range(2): torch.testing.assert_close(x.grad[i, 0, :4, 4:], contrast*up.T@weights[2 + i, 0]@up)

def test_limit_draws_a_subset_for_each_class():
    syn = SyntheticSet(torch.rand(10, 1, 4, 4), torch.tensor([0]*3 + [1]*7), factor=2, limit=16).requires_grad_(False)
    whole, count = syn.everything()[0], torch.zeros(40)
    for _ in range(300):
        found = (syn(torch.arange(2))[:, None] == whole).flatten(2).all(2) # (28,40)
        assert found.any(1).all() and found.sum(0).max() == 1
        assert found[:12, :12].any(1).all() # the small class is whole
        count += found.sum(0)
    torch.testing.assert_close(count[12:]/300, torch.full((28,), 16/28), atol=.12, rtol=0)

def test_pixels_are_the_sets_own():
    start = torch.rand(2, 1, 1, 4, 4)
    syn = SyntheticSet(start, None)
    with torch.no_grad(): syn.pixels.add_(2)
    assert start.max() <= 1
    syn.clamp_()
    assert syn.pixels.eq(1).all() and [n for n, _ in syn.named_parameters()] == ['pixels']

# What is kept

def a_set(classes, channels=1, n=2, **kw):
    return DistilledSet(torch.rand(len(classes), n, channels, 8, 8), classes, [.5]*channels, [.2]*channels, **kw)

def test_round_trip(tmp_path):
    dset = a_set(['a', 'b', 'c'], 3, factor=2, decode='multi', evaluation=dict(width=32), provenance=dict(seed=3))
    dset.save(tmp_path/'deep'/'set')
    back = load_distilled(tmp_path/'deep'/'set')
    assert torch.equal(back.pixels, dset.pixels) and torch.equal(back.labels(), torch.arange(3).repeat_interleave(10))
    tensors = dict(pixels=0, y=0)
    assert vars(back) | tensors == vars(dset) | tensors
    assert torch.equal(back.images(), decode(dset.pixels.unflatten(0, (3, 2)), 2, 'multi').flatten(0, 1))

@pytest.mark.parametrize('writer', ['save_state', 'write_json'])
def test_save_that_fails(tmp_path, monkeypatch, writer):
    "leaves the old set, and not one file of each"
    old, new = a_set(['a', 'b'], factor=2), a_set(['c', 'd'])
    old.save(tmp_path)
    def full(path, content): raise OSError(28, 'No space left on device', str(path))
    monkeypatch.setattr('dreamplus.distilled.' + writer, full)
    with pytest.raises(OSError) as e: new.save(tmp_path)
    name = dict(save_state='distilled.safetensors', write_json='distilled.json')[writer]
    assert Path(e.value.filename) == tmp_path/name
    back = load_distilled(tmp_path)
    assert (back.classes, back.factor) == (['a', 'b'], 2) and torch.equal(back.pixels, old.pixels)
    assert {p.name for p in tmp_path.iterdir()} == {'distilled.safetensors', 'distilled.json'}

def test_labels_in_a_file_are_used(tmp_path):
    "whatever their order; files of version 0.1 have a class axis, and the order of classes where they have no labels"
    pixels, classes = torch.rand(3, 2, 1, 8, 8), ['a', 'b', 'c']
    a_set(classes).save(tmp_path)
    info = read_json(tmp_path/'distilled.json')
    write_json(tmp_path/'distilled.json', info | dict(format=1))
    for labels, order in ({}, range(6)), (dict(labels=torch.tensor([2, 1, 2, 0, 0, 1])), (3, 4, 1, 5, 0, 2)):
        save_state(tmp_path/'distilled.safetensors', dict(pixels=pixels) | labels)
        back = load_distilled(tmp_path)
        assert back.labels().tolist() == [0, 0, 1, 1, 2, 2]
        assert torch.equal(back.images(), pixels.flatten(0, 1)[list(order)])

@pytest.mark.parametrize('change, says', [
    (dict(format=3), 'not of format 1'), (dict(classes=['a']), 'does not hold images of the 1 classes'),
    (dict(classes=3), 'classes=3 must be a list'), (dict(colour=1), 'is damaged'), ([], 'must be a dictionary')])
def test_damaged(tmp_path, change, says):
    a_set(['a', 'b']).save(tmp_path)
    info = json.loads((tmp_path/'distilled.json').read_text())
    (tmp_path/'distilled.json').write_text(json.dumps(info | change if change else change))
    with pytest.raises(ValueError) as e: load_distilled(tmp_path)
    assert says in str(e.value) and 'distilled.' in str(e.value) and '\n' not in str(e.value)

def test_imagefolder_of_awkward_names(tmp_path):
    names = ['T-shirt/top', '..', '.hidden', 'a:b', 'a/b', 'Ankle boot', 'ネコ']
    dset = a_set(names, 3)
    dset.to_imagefolder(tmp_path/'out')
    folders = sorted(p.name for p in (tmp_path/'out').iterdir())
    assert folders == ['0_T-shirt_top', '1__', '2_hidden', '3_a_b', '4_a_b', '5_Ankle boot', '6_ネコ', 'classes.json']
    assert [p.name for p in tmp_path.iterdir()] == ['out']
    data = load_data(tmp_path/'out', fraction=.5)
    assert data.classes == names and len(data.train) == len(data.test) == len(names)
    png = torch.tensor(np.array(Image.open(tmp_path/'out'/'2_hidden'/'0001.png')))/255
    assert (png - dset.images()[5].permute(1, 2, 0)).abs().max() < .51/255

def test_imagefolder_refuses(tmp_path):
    (tmp_path/'file').write_text('')
    for path, channels in (tmp_path/'file', 1), (tmp_path, 3), (tmp_path/'new', 2):
        with pytest.raises(ValueError): a_set([*'ab'], channels).to_imagefolder(path)
    assert [p.name for p in tmp_path.iterdir()] == ['file']

@pytest.mark.parametrize('classes, n, channels', [(1, 1, 1), (3, 12, 3), (10, 1, 2), (23, 4, 1)])
def test_picture_holds_every_image(classes, n, channels):
    "each class in lines of at most ten images, so that no page is wider than that"
    page = picture(torch.zeros(classes, n, channels, 8, 8), list(range(classes)), cell=8)
    black = torch.tensor(np.array(page.convert('L')) == 0).float()
    windows = torch.nn.functional.avg_pool2d(black[None], 8, stride=1) == 1 # 8x8 black squares, two white pixels apart
    assert windows.sum() == classes*n and page.width <= 10*10 + 10*4

def test_dls():
    dset = a_set(['a', 'b', 'c'], n=30)
    dls = dset.dls(bs=32)
    x, y = dls.one_batch()
    assert x.shape == (32, 1, 8, 8) and dls.c == 3 and len(dls.train) == 3 and len(dls.valid_ds) == 90
    torch.testing.assert_close(dset.dataset(normalize=True)[40][0], (dset.images()[40] - .5)/.2)
    assert dset.dataset()[40][1] == 1

# Values

USES = dict(images=lambda s, _: s.images(), stored=lambda s, _: s.images(decoded=False),
            dataset=lambda s, _: s.dataset(), dls=lambda s, _: s.dls(), show=lambda s, _: s.show(),
            png=lambda s, path: s.to_imagefolder(path/'png'))

@pytest.mark.parametrize('use', USES)
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_values_that_are_no_numbers_are_refused(tmp_path, use, value):
    dset = a_set([*'abc'])
    dset.pixels[-1, 0, 3, 3] = value
    dset.save(tmp_path/'set')
    for s in dset, load_distilled(tmp_path/'set'): # can be loaded, to find out what is wrong
        with pytest.raises(ValueError, match=f"stored image {len(dset.y) - 1}, of class 'c', has pixels that are not"):
            USES[use](s, tmp_path)
    assert not (tmp_path/'png').exists()

@pytest.mark.parametrize('constants', [dict(mean=[math.nan]), dict(std=[math.nan]), dict(std=[0.]), dict(std=[-1.])])
def test_constants_that_cannot_normalise_are_refused(constants):
    with pytest.raises(ValueError, match='mean=.*std=.*cannot normalise'): replace(a_set([*'ab'], 1), **constants).dls()

def test_png_says_what_it_clips(tmp_path):
    dset = a_set([*'ab'])
    dset.pixels[0, 0, :4] = torch.tensor([-2., 3.]).repeat(4)
    share = 32/dset.pixels.numel()
    with pytest.warns(UserWarning, match=f'{share:.2%} of the values lie outside .*safetensors.*numpy.save'):
        dset.to_imagefolder(tmp_path/'a')
    first = np.array(Image.open(tmp_path/'a'/'a'/'0000.png'))
    assert first[:4].tolist() == [[0, 255]*4]*4
    dset.pixels.clamp_(-.4/255, 1 + .4/255) # what rounding to 8 bits moves anyway
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        dset.to_imagefolder(tmp_path/'b')
    dset.save(tmp_path/'c')
    assert torch.equal(load_distilled(tmp_path/'c').pixels, dset.pixels)
