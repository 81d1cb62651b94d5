"Image files show what a person sees; nothing else is opened, and nothing hangs."
import os
import socket
import stat
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch.testing import assert_close

from dreamplus.data.sources import load_data
from dreamplus.images import eight_bits, from_pil, image_suffixes, read_image

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('DREAMPLUS_CACHE', str(tmp_path/'cache'))

def tree(root, save, n=3):
    "Two classes of `n` images; save(path without suffix, number)"
    for c, name in enumerate(('ant', 'bee')):
        (root/name).mkdir(parents=True)
        for i in range(n): save(root/name/f'{i}', c*n + i)
    return root

def noise(i, size=8): return np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
def pngs(root, image=lambda i: noise(i), **kw):
    "A tree of PNG files"
    return tree(root, lambda path, i: Image.fromarray(image(i)).save(f'{path}.png', **kw))

def same(x, expected): assert_close(x, torch.as_tensor(np.ascontiguousarray(expected)).to(torch.uint8), rtol=0, atol=0)

# Orientation

STORED = np.repeat(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6, 1), 3, 2) # asymmetric
STORED = np.kron(STORED, np.ones((8, 8, 1), np.uint8)) # blocks of JPEG
TURNS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}

def with_exif(path, tag, kind, **kw):
    exif = Image.Exif()
    exif[0x112] = tag
    Image.fromarray(STORED).save(path, kind, exif=exif, **kw)

@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'AVIF'])
def test_every_orientation(tmp_path, kind):
    if kind == 'AVIF' and not features.check('avif'): pytest.skip('needs a Pillow that writes AVIF')
    kw = {'JPEG': dict(quality=100), 'WEBP': dict(lossless=True), 'AVIF': dict(quality=100)}.get(kind, {})
    for tag, turn in TURNS.items():
        with_exif(tmp_path/f'{tag}', tag, kind, **kw)
        x = read_image(tmp_path/f'{tag}').permute(1, 2, 0).int()
        assert (x - torch.from_numpy(turn(STORED).copy()).int()).abs().max() <= 3, (kind, tag)

def test_upright_copies_are_the_same_images(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    upright = load_data(pngs(tmp_path/'upright'))
    assert load_data(pngs(tmp_path/'lying', lambda i: np.rot90(noise(i)).copy(), exif=exif)).digest == upright.digest
    items = [(Image.open(p), c) for c, name in enumerate(('ant', 'bee'))
             for p in sorted((tmp_path/'lying'/name).iterdir())]
    assert load_data(items).digest == upright.digest # of a map-style dataset too

@pytest.mark.parametrize('exif', [b'Exif\0\0garbage', b'Exif\0\0II*\0\xff\xff\xff\xff', b'',
                                  struct.pack('>6sHI', b'Exif\0\0', 9, 9)])
def test_damaged_exif_is_passed_over(tmp_path, exif):
    Image.fromarray(STORED).save(tmp_path/'a.png', exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # of Pillow
        same(read_image(tmp_path/'a.png'), STORED.transpose(2, 0, 1))

# Transparency

CLEAR = [('RGBA', (200, 10, 10, 0), (255, 255, 255)), ('RGBA', (0, 0, 0, 51), (204, 204, 204)),
         ('RGBA', (7, 8, 9, 255), (7, 8, 9)),
         ('LA', (0, 0), (255,)), ('LA', (9, 255), (9,)), ('RGBa', (0, 0, 0, 0), (255, 255, 255))]

@pytest.mark.parametrize('mode, stored, shown', CLEAR)
def test_transparency_lies_on_white(mode, stored, shown):
    same(from_pil(Image.new(mode, (2, 2), stored))[:, 1, 1], np.array(shown))

@pytest.mark.parametrize('mode, hole, channels', [('P', 0, 3), ('L', 80, 1), ('RGB', (80, 90, 100), 3), ('1', 0, 1),
                                                  ('I;16', 2000, 1)])
def test_transparent_colour_of_a_png(tmp_path, mode, hole, channels):
    image = Image.new(mode, (4, 4), hole)
    if mode == 'P': image.putpalette([80, 90, 100, 20, 20, 20])
    image.save(tmp_path/'a.png', transparency=hole)
    x = read_image(tmp_path/'a.png')
    assert x.shape == (channels, 4, 4) and (x == 255).all()

@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'TIFF', 'ICO'])
def test_transparency_of_other_formats(tmp_path, kind):
    image = Image.new('RGBA', (16, 16), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (8, 0, 16, 16))
    image.save(tmp_path/'a', kind, **dict(lossless=True) if kind == 'WEBP' else {})
    x = read_image(tmp_path/'a')
    same(x[:, 3, 3], np.array([255, 255, 255])), same(x[:, 3, 12], np.array([255, 0, 0]))

# More than 8 bits

DEEP = np.array([[0, 257, 2000], [5000, 32896, 65535], [128, 129, 65000]], np.uint16)
SHOWN = [[[0, 1, 8], [19, 128, 255], [0, 1, 253]]]

def as_16_bits(path, kind):
    if kind == 'big-endian TIFF': Image.frombytes('I;16B', (3, 3), DEEP.astype('>u2').tobytes()).save(path, 'TIFF')
    elif kind == 'PGM': path.write_bytes(b'P5 3 3 65535\n' + DEEP.astype('>u2').tobytes())
    else: Image.fromarray(DEEP).save(path, kind)

@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'big-endian TIFF', 'PGM', 'JPEG2000'])
def test_sixteen_bits(tmp_path, kind):
    as_16_bits(tmp_path/'a', kind)
    same(read_image(tmp_path/'a'), np.array(SHOWN))

def test_levels(tmp_path):
    "12-bit values in 16-bit files; from 1,000 up black, from 3,000 down white"
    path = pngs(tmp_path/'ct', lambda i: np.array([[0, 1000], [2000, 4095]], np.uint16))
    data = load_data(path, levels=(1000, 3000))
    same(data.train.x[0], np.array([[[0, 0], [128, 255]]]))
    same(load_data(path).train.x[0], np.array([[[0, 4], [8, 16]]])) # another cache entry
    assert load_data(**data.origin).digest == data.digest != load_data(path).digest
    with pytest.raises(ValueError, match='0.png: levels=.* has no effect on images of 8 bits'):
        load_data(pngs(tmp_path/'plain'), levels=(0, 9))

@pytest.mark.parametrize('levels', [(1,), (3, 3), (5, 1), (0, float('nan')), 'ab', 7, (0, float('inf'))])
def test_levels_refused(levels):
    said = 'levels=.*(two numbers.*write|must be tuple)'
    with pytest.raises((TypeError, ValueError), match=said): load_data(levels=levels)

def test_floats_and_long_integers(tmp_path):
    Image.fromarray(np.array([[0, .25], [.5, 1]], np.float32)).save(tmp_path/'unit.tif')
    same(read_image(tmp_path/'unit.tif'), np.array([[[0, 64], [128, 255]]]))
    Image.fromarray(np.array([[-1024, 0], [0, 1024]], np.int32)).save(tmp_path/'ct.tif')
    same(read_image(tmp_path/'ct.tif', levels=(-1024, 1024)), np.array([[[0, 128], [128, 255]]]))
    for name, values in dict(ct=None, far=[[0., 300]], nan=[[0., np.nan]], inf=[[0., np.inf]]).items():
        if values: Image.fromarray(np.array(values, np.float32)).save(tmp_path/f'{name}.tif')
        with pytest.raises(ValueError, match=rf'{name}.tif: .*levels=\(low, high\)'): read_image(tmp_path/f'{name}.tif')

@pytest.mark.parametrize('dtype', ['uint16', '<u2', 'float64', 'float32'])
def test_arrays_follow_the_same_rule(dtype):
    values = np.stack([DEEP, DEEP[::-1]]*3)
    x = (values/65535 if dtype[0] == 'f' else values).astype(dtype)
    same(load_data((x, [0, 0, 0, 1, 1, 1]), test=(x, [0, 0, 0, 1, 1, 1])).train.x[0], np.array(SHOWN))

def test_arrays_with_levels():
    x = torch.tensor([[-1024, 0], [0, 1024]]).expand(4, 2, 2)
    with pytest.raises(ValueError, match='torch.int64; convert them to uint8.*levels'): load_data((x, [0, 0, 1, 1]))
    same(load_data((x, [0, 0, 1, 1]), levels=(-1024, 1024)).train.x[0], np.array([[[0, 128], [128, 255]]]))
    with pytest.raises(ValueError, match='NaN or infinite; replace them'):
        eight_bits(torch.tensor([0., torch.nan]), levels=(0, 1))

# Which files are opened

@pytest.mark.parametrize('suffix, kind', [
    ('jfif', 'JPEG'), ('jpe', 'JPEG'), ('JPG', 'JPEG'), ('avif', 'AVIF'), ('jp2', 'JPEG2000'), ('tga', 'TGA'),
    ('tiff', 'TIFF'), ('pnm', 'PPM'), ('apng', 'PNG'), ('ico', 'ICO'),
    ('jpg', 'PNG')]) # named wrongly, as one file of ImageNet
def test_suffixes(tmp_path, suffix, kind):
    if kind == 'AVIF' and not features.check('avif'): pytest.skip('needs a Pillow that writes AVIF')
    def save(path, i): Image.new('RGB', (16, 16), (20*i, 90, 200)).save(f'{path}.{suffix}', kind)
    data = load_data(tree(tmp_path/'d', save))
    assert (len(data.train) + len(data.test), data.size) == (6, 16)

def test_others_are_counted_and_named_once(tmp_path):
    root = pngs(tmp_path/'d')
    for name in ('ant/a.psd', 'ant/b.psd', 'bee/notes.TXT', 'bee/LICENSE', 'bee/.hidden'):
        (root/name).write_text('8BPS')
    with pytest.warns(UserWarning) as said: data = load_data(root)
    about, = [str(w.message) for w in said]
    assert f'{root}: files that are not images are left out: 2 with .psd (ant' in about
    assert '1 with .txt (bee' in about and 'LICENSE' in about and 'hidden' not in about
    assert len(data.train) + len(data.test) == 6

def test_no_program_is_started(tmp_path, monkeypatch):
    "Pillow chooses the decoder by content, and that of PostScript starts Ghostscript"
    ran = tmp_path/'ran'
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin'/'gs').write_text(f'#!/bin/sh\necho "$@" >> {ran}\necho 10\n')
    (tmp_path/'bin'/'gs').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path/'bin'), prepend=os.pathsep)
    monkeypatch.setattr('PIL.EpsImagePlugin.gs_binary', None)
    script = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n'
    for i, name in enumerate(('0.jpg', '1.png', '2.tif', '3.tga', '4.gif', '5.ico')):
        root = pngs(tmp_path/f'{i}')
        (root/'ant'/name).write_bytes(script)
        with pytest.raises(ValueError, match=f'{name} cannot be decoded.*replace or remove'): load_data(root)
    assert '.eps' not in image_suffixes() and '.ps' not in image_suffixes() and '.pdf' not in image_suffixes()
    assert not ran.exists()

def test_no_module_opens_images_by_itself(root):
    "so that the list of formats holds everywhere"
    opening = [p.name for p in (root/'dreamplus').rglob('*.py') if 'Image.open(' in p.read_text(encoding='utf-8')]
    assert opening == ['images.py']

def fifo(path): os.mkfifo(path)
def a_socket(path):
    before = os.getcwd()
    os.chdir(path.parent) # a short path
    with socket.socket(socket.AF_UNIX) as s: s.bind(path.name)
    os.chdir(before)
def device(path): path.symlink_to('/dev/zero')

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs a system with named pipes')
@pytest.mark.parametrize('make', [fifo, a_socket, device])
def test_what_is_no_file_cannot_hang(tmp_path, make):
    root = pngs(tmp_path/'d')
    make(root/'ant'/'x.png')
    assert not stat.S_ISREG((root/'ant'/'x.png').stat().st_mode)
    with pytest.raises(ValueError, match='x.png is not a regular file; remove it'): load_data(root)
    with pytest.raises(ValueError, match='x.png is not a regular file'): read_image(root/'ant'/'x.png')
    (root/'ant'/'x.png').rename(root/'ant'/'x') # among the others
    with pytest.warns(UserWarning, match='1 with no suffix'): assert load_data(root).size == 8

def test_limit_of_pixels_is_named(tmp_path, monkeypatch):
    root = pngs(tmp_path/'d')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 20)
    with pytest.raises(ValueError, match='0.png cannot be decoded.*PIL.Image.MAX_IMAGE_PIXELS=20 pixels'):
        load_data(root, size=4)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert load_data(root, size=4).size == 4

def test_levels_on_the_command_line(tmp_path, capsys):
    from dreamplus.cli import main
    from dreamplus.core import read_json
    for c in 'ab':
        (tmp_path/'ds'/c).mkdir(parents=True)
        for i in range(4): Image.fromarray(np.full((8, 8), 900*i, np.float32)).save(tmp_path/'ds'/c/f'{i}.tif')
    command = ['distill', str(tmp_path/'ds'), *'--method dm --width 8 --outer 1 --inner 1 --nets 0'.split()]
    assert main([*command, '--out', str(tmp_path/'run'), '--levels', '0,4095']) == 0
    assert read_json(tmp_path/'run'/'run.json')['data']['origin']['levels'] == [0, 4095]
    assert main([*command, '--levels', 'x']) == 2 and "'x' is not a list of numbers" in capsys.readouterr().err
    assert main(['scores', str(tmp_path/'run'), '--root', '/nowhere']) == 2
    assert "root='/nowhere' is not a folder" in capsys.readouterr().err
