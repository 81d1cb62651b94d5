"Sources of every kind, and what is refused: folders on disk, files that fail, caches, downloads."
import gzip
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from dreamplus.core import load_state, save_state, toy_images
from dreamplus.data import reading as module
from dreamplus.data.core import Split, image_grid, to_float
from dreamplus.data.datasets import DATASETS
from dreamplus.data.sources import load_arrays, load_data
from dreamplus.machine import cache_folder

X, Y = toy_images(classes=3, per_class=8, channels=3)
PIXELS = X.permute(0, 2, 3, 1).numpy()

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('DREAMPLUS_CACHE', str(tmp_path/'cache'))

def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Image.Image): image = Image.fromarray(image)
    image.save(path)
    return path

def write_tree(folder, counts=(8, 8, 8), suffix='png'):
    for c, n in enumerate(counts):
        for i in range(n): save(folder/f'class {c}'/f'{i}.{suffix}', PIXELS[8*c + i])
    return folder

@pytest.fixture
def tree(tmp_path): return write_tree(tmp_path/'toys')

class MapStyle:
    "A dataset as torchvision writes them: items only"
    classes = ['ant', 'bee', 'cat']
    def __init__(self, images, labels): self.images, self.labels = images, labels
    def __len__(self): return len(self.labels)
    def __getitem__(self, i): return self.images[i], self.labels[i]

def refused(*parts):
    "One line that says all of `parts`, with nothing chained to it"
    class Refused:
        def __enter__(self): return self
        def __exit__(self, kind, error, _):
            assert kind is ValueError, f'{kind}: {error}'
            assert error.__suppress_context__ or error.__context__ is None
            assert '\n' not in str(error)
            assert not [p for p in parts if p not in str(error)], str(error)
            return True
    return Refused()

def everything(data): return torch.cat([data.train.x, data.test.x]).flatten(1).sum(1).sort().values

# Arrays

LAYOUTS = {'NCHW': X, 'NHWC': PIXELS, 'float': to_float(X), 'float64': PIXELS/255, 'strided': PIXELS[::-1][::-1],
           'read-only': np.broadcast_to(PIXELS, PIXELS.shape)}

@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_agree(layout):
    data = load_data((LAYOUTS[layout], Y), test=(X, Y))
    assert_close(data.train.x, X)
    assert (data.channels, data.size, data.n_classes) == (3, 8, 3)

@pytest.mark.parametrize('shape, channels', [((6, 8, 8), 1), ((6, 1, 8, 8), 1), ((6, 8, 8, 1), 1), ((6, 5, 8, 8), 5),
                                             ((6, 8, 8, 64), 64), ((6, 64, 8, 8), 64), ((6, 3, 3, 3), 3),
                                             ((6, 1, 1), 1), ((6, 1, 1, 3), 3)])
def test_any_channels(shape, channels):
    data = load_data((torch.zeros(shape, dtype=torch.uint8), [0, 0, 0, 1, 1, 1]))
    assert data.channels == channels and len(data.mean) == len(data.std) == channels
    assert data.normalize(to_float(data.train.x)).isfinite().all()

@pytest.mark.parametrize('y', [Y.tolist(), Y.numpy().astype('uint8'), Y.double(), Y.int()])
def test_labels_of_any_integer_type(y): assert load_data((X, y)).digest == load_data((X, Y)).digest

def test_two_classes_as_bools(): assert load_data((X, Y > 0)).classes == ['0', '1']

def test_labels_become_zero_to_c():
    data = load_data((X, (2 - Y)*10 - 5))
    assert data.classes == ['-5', '5', '15']
    assert_close(data.train.y.unique(), torch.arange(3))
    own = load_data((X, Y), test=(X[8:], Y[8:]))
    assert own.test.counts == [0, 8, 8]

def test_unequal_and_tiny_classes():
    data = load_data((X[:15], [0]*1 + [1]*2 + [2]*12))
    assert data.train.counts == [1, 1, 8] and data.test.counts == [0, 1, 4]
    assert data.train.starts == [0, 1, 2]
    held = data.hold_out(.5)
    assert held.train.counts == [1, 1, 4] and held.valid.counts == [0, 0, 4]
    assert_close(everything(load_data((X, Y))), X.flatten(1).sum(1).sort().values, check_dtype=False)
    with refused('have a validation split already'): held.hold_out(.5)

@pytest.mark.parametrize('x, y, says', [
    (to_float(X).index_fill(0, torch.tensor(3), torch.nan), Y, 'must lie in [0, 1]'),
    (to_float(X).index_fill(0, torch.tensor(3), torch.inf), Y, 'to inf'),
    (to_float(X)*255, Y, 'to 255'), (X.int(), Y, 'convert them to uint8'), (X[0, 0], Y, 'of shape (8, 8)'),
    (X[:0], Y[:0], 'at least one'), (X[:, :, :7], Y, '8x7 with 3 channels, not square; give size=32'),
    (['a', 'b'], [0, 1], 'one array of numbers'), ([X[0], X[1, :, :4]], [0, 1], 'one array of numbers'),
    (X, Y[1:], '24 images but 23 labels'), (X, Y + .5, 'whole numbers'), (X, Y.double()*torch.nan, 'whole numbers'),
    (X, ['a']*24, 'whole numbers'), (X, torch.eye(24), 'of shape (24, 24)'), (X, Y*0, 'one class only'),
    (X[:3], [0, 1, 2], 'every class has one image')])
def test_arrays_refused(x, y, says):
    with refused(says): load_data((x, y))

def test_a_class_that_train_lacks():
    with refused("class '2'", 'train lacks'): load_data((X[:16], Y[:16]), test=(X, Y))

# Datasets

@pytest.mark.parametrize('images', [PIXELS, X, to_float(X), [Image.fromarray(p) for p in PIXELS]], ids=type)
def test_map_style(images):
    data = load_data(MapStyle(images, Y))
    assert data.name == 'mapstyle' and data.classes == ['ant', 'bee', 'cat']
    assert data.digest == load_data((X, Y)).digest

def test_fake_data_of_torchvision():
    from torchvision.datasets import FakeData
    data = load_data(FakeData(30, (3, 16, 16), num_classes=3))
    assert (data.channels, data.size, len(data.train) + len(data.test)) == (3, 16, 30)

def test_two_classes_of_one_name():
    cranes = MapStyle(PIXELS, Y)
    cranes.classes = ['crane', 'dog', 'crane']
    data = load_data(cranes, test=cranes)
    assert data.classes == ['crane 0', 'dog', 'crane 2'] and data.test.counts == [8, 8, 8]

@pytest.mark.parametrize('dataset, says', [
    ([], 'no images'), ([{'image': 1, 'label': 2}], 'give items (image, label)'), (X, 'a tuple (x, y)'),
    (MapStyle([*PIXELS[:3], PIXELS[3, :4]], [0, 1, 0, 1]), 'item 0 is 8x8 with 3 channels but item 3 is 8x4'),
    (MapStyle(to_float(X)*255, Y), 'item 0: float images must lie'), (MapStyle(PIXELS, 'a'*24), 'whole numbers')])
def test_datasets_refused(dataset, says):
    with refused(says): load_data(dataset)

# Folders

def test_one_tree_is_split(tree):
    data = load_data(tree)
    assert data.name == 'toys' and data.classes == ['class 0', 'class 1', 'class 2']
    assert data.digest == load_data((X, Y)).digest

@pytest.mark.parametrize('test', ['test', 'val'])
def test_train_and_test(tmp_path, test):
    write_tree(tmp_path/'toys'/'train', (2, 8, 1))
    write_tree(tmp_path/'toys'/test, (0, 3, 4))
    data = load_data('toys', root=tmp_path)
    assert data.train.counts == [2, 8, 1] and data.test.counts == [0, 3, 4]

def test_two_trees(tree, tmp_path):
    data = load_data(tree, test=write_tree(tmp_path/'more', (0, 2, 2)))
    assert data.name == 'toys' and data.train.counts == [8, 8, 8] and data.test.counts == [0, 2, 2]

def test_other_files_and_depth(tree):
    (tree/'class 0'/'notes.txt').write_text('not an image')
    (tree/'class 0'/'._0.png').write_text('nor this')
    (tree/'README').write_text('nor this')
    (tree/'class 1'/'deep').mkdir()
    shutil.move(tree/'class 1'/'0.png', tree/'class 1'/'deep'/'0.PNG')
    assert_close(everything(load_data(tree)), everything(load_data((X, Y))))

@pytest.mark.parametrize('mode, channels', [('1', 1), ('L', 1), ('LA', 1), ('P', 3), ('RGB', 3), ('RGBA', 3)])
def test_modes(tmp_path, mode, channels):
    for c in 'ab':
        for i in range(2): save(tmp_path/'m'/c/f'{i}.png', Image.fromarray(PIXELS[i]).convert(mode))
    assert load_data(tmp_path/'m').channels == channels
    assert load_data(tmp_path/'m', channels=3, size=4).train.x.shape[1:] == (3, 4, 4)

@pytest.mark.parametrize('suffix', ['jpg', 'JPEG', 'bmp', 'webp'])
def test_formats(tmp_path, suffix): assert load_data(write_tree(tmp_path/'f', suffix=suffix)).size == 8

def test_resize_and_crop(tmp_path):
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 255 # the centre
    for c in 'ab': save(tmp_path/'w'/c/'0.png', wide), save(tmp_path/'w'/c/'1.png', np.full((9, 9), 255, np.uint8))
    data = load_data(tmp_path/'w', size=10, channels=1)
    assert data.train.x.shape == (2, 1, 10, 10) and data.train.x[..., 1:-1].min() == 255

def spoil(tree, what):
    bad, first = tree/'class 1'/'bad.png', tree/'class 0'/'0.png'
    if what == 'missing': shutil.rmtree(tree)
    if what == 'bare': shutil.rmtree(tree), tree.mkdir()
    if what == 'one class': shutil.rmtree(tree/'class 0'), shutil.rmtree(tree/'class 1')
    if what == 'empty class': (tree/'class 3').mkdir()
    if what == 'dangling': bad.symlink_to(tree/'nowhere')
    if what == 'truncated': save(bad.with_suffix('.jpg'), PIXELS[0]), os.truncate(bad.with_suffix('.jpg'), 500)
    if what == 'empty file': bad.touch()
    if what == 'sizes': save(bad, np.zeros((9, 10, 3), np.uint8))
    if what == 'channels': save(bad, np.zeros((8, 8), np.uint8))
    if what == 'not square': save(first, np.zeros((8, 9, 3), np.uint8))

@pytest.mark.parametrize('what, says', {
    'missing': ['toys is not a folder', 'give the name of a dataset'], 'bare': ['holds no class folders'],
    'one class': ["one class only, 'class 2'"], 'empty class': ['class 3 holds no images'],
    'dangling': ['bad.png cannot be read'], 'truncated': ['bad.jpg cannot be decoded', 'truncated'],
    'empty file': ['bad.png cannot be decoded'],
    'sizes': ['0.png is 8x8', 'bad.png is 10x9', 'size=32 (--size 32)'],
    'channels': ['0.png is 8x8 with 3 channels', 'bad.png is 8x8 with 1 channel;', 'channels=3 (--channels 3)'],
    'not square': ['0.png is 9x8', 'not square', 'size=32']}.items())
def test_folders_refused(tree, what, says):
    spoil(tree, what)
    with refused(*says): load_data(tree)
    assert not cache_folder().exists()

# The cache

@pytest.fixture
def decoded(monkeypatch, tmp_path):
    "The paths of this test that are decoded from here on; threads of the test before may still decode"
    paths, decode = [], module.decode_file
    def record(path, *args):
        if Path(path).is_relative_to(tmp_path): paths.append(path)
        return decode(path, *args)
    monkeypatch.setattr(module, 'decode_file', record)
    return paths

def test_second_load_decodes_nothing(tree, decoded):
    first = load_data(tree)
    assert len(decoded) == 24
    again = load_data(tree)
    assert len(decoded) == 24 and again.digest == first.digest
    assert load_data(tree, size=4).size == 4 and len(decoded) == 48
    assert len([*cache_folder().rglob('*.safetensors')]) == 2

def rewrite(path, image):
    "Write another image of the same number of bytes, and set the times back"
    before = path.stat()
    save(path, image)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

@pytest.mark.parametrize('change, again', dict(touch=0, rename=0, add=25, remove=23, damage=24, rewrite=24).items())
def test_a_change_is_seen(tmp_path, decoded, change, again):
    tree = write_tree(tmp_path/'toys', suffix='bmp') # all files have the same size
    before = load_data(tree)
    if change == 'touch': os.utime(tree/'class 0'/'0.bmp', ns=(0, 0))
    if change == 'rename': (tree/'class 0').rename(tree/'class 00')
    if change == 'add': save(tree/'class 0'/'8.bmp', PIXELS[0])
    if change == 'remove': (tree/'class 0'/'0.bmp').unlink()
    if change == 'damage': os.truncate(*cache_folder().rglob('*.safetensors'), 100)
    if change == 'rewrite': rewrite(tree/'class 0'/'0.bmp', PIXELS[0][::-1].copy())
    decoded.clear()
    after = load_data(tree)
    assert len(decoded) == again
    assert (after.digest != before.digest) == (change in ('add', 'remove', 'rewrite'))
    assert len([p for p in cache_folder().rglob('*') if p.is_file() and p.name != '.lock']) == 1

def test_folder_is_only_read(tree):
    before = sorted(tree.rglob('*'))
    for p in [tree, *before]: p.chmod(0o555 if p.is_dir() else 0o444)
    try: load_data(tree)
    finally:
        for p in [tree, *before]: p.chmod(0o755)
    assert sorted(tree.rglob('*')) == before

def full_disk(path, state): raise OSError(28, 'No space left on device')

@pytest.mark.parametrize('why', ['a file is in the way', 'full disk'])
def test_cache_that_cannot_be_written(tree, tmp_path, monkeypatch, why):
    if why == 'full disk': monkeypatch.setattr(module, 'save_state', full_disk)
    else: (tmp_path/'cache').write_text('in the way')
    with pytest.warns(UserWarning, match='cannot be written.*DREAMPLUS_CACHE'): data = load_data(tree)
    assert data.digest == load_data((X, Y)).digest

def test_progress_is_shown_when_asked(tree, capsys):
    load_data(tree)
    assert capsys.readouterr() == ('', '')
    load_data(tree, size=4, progress=True)
    assert '24/24' in capsys.readouterr().err

# Named datasets

def test_digits():
    from sklearn.datasets import load_digits
    data = load_data()
    assert (len(data.train), len(data.test), data.n_classes, data.train.x.max()) == (1257, 540, 10, 255)
    x = (torch.from_numpy(load_digits().data)*255/16).round().sum(1)
    assert_close(everything(data), x.sort().values, check_dtype=False)
    assert load_data(seed=1).digest != data.digest == load_data(seed=0).digest
    assert max(data.test.counts) - min(data.test.counts) <= 3

def test_mnist(shared_data, tmp_path, monkeypatch):
    if not (shared_data/'mnist').is_dir(): pytest.skip('needs ../shared/data/mnist, which is not here')
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9') # no network
    raw = tmp_path/'MNIST'/'raw'
    shutil.copytree(shared_data/'mnist', raw)
    raw.chmod(0o755)
    data = load_data('mnist', root=tmp_path)
    assert (len(data.train), len(data.test), data.size) == (60000, 10000, 28)
    assert data.classes == [*'0123456789'] and data.train.counts[0] == 5923
    assert_close(data.mean.flatten(), torch.tensor([.1307]))
    measured = data.with_stats(None)
    assert_close(torch.stack([measured.mean, measured.std]).flatten(), torch.tensor([.1307, .3081]), atol=5e-5, rtol=0)

@pytest.mark.parametrize('name', [name for name, row in DATASETS.items() if row.torchvision])
def test_offline(name, tmp_path, monkeypatch):
    for k in ('http_proxy', 'https_proxy'): monkeypatch.setenv(k, 'http://127.0.0.1:9')
    row = DATASETS[name]
    with refused(f'{name} cannot be read', *row.files, str(tmp_path/row.folder)): load_data(name, root=tmp_path)

def test_file_names_are_those_of_torchvision():
    from torchvision import datasets
    for name in ('mnist', 'fashionmnist'):
        cls = getattr(datasets, DATASETS[name].torchvision)
        assert sorted(DATASETS[name].files) == sorted(f for f, _ in cls.resources)
    assert DATASETS['svhn'].files == tuple(datasets.SVHN.split_list[k][1] for k in ('train', 'test'))
    assert DATASETS['cifar10'].files == (datasets.CIFAR10.filename,)
    assert DATASETS['cifar100'].files == (datasets.CIFAR100.filename,)

def test_damaged_download_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    raw = tmp_path/'MNIST'/'raw'
    raw.mkdir(parents=True)
    (raw/'train-images-idx3-ubyte.gz').write_bytes(gzip.compress(b'0'*1000)[:15])
    with refused('mnist cannot be read', 'train-images-idx3-ubyte.gz'): load_data('mnist', root=tmp_path)
    assert [p.name for p in raw.iterdir()] == ['train-images-idx3-ubyte.gz']

@pytest.mark.parametrize('write', [np.savez, np.savez_compressed])
def test_damaged_arrays_raise_value_errors_only(tmp_path, write):
    "numpy, zipfile and zlib raise errors of many kinds"
    write(path := tmp_path/'toys.npz', images=X, labels=Y)
    raw, rng = path.read_bytes(), Random(0)
    for _ in range(200):
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
        path.write_bytes(damaged[:rng.choice([len(raw), rng.randrange(len(raw))])])
        with suppress(ValueError): load_arrays(path)

# Arguments

@pytest.mark.parametrize('arguments, says', [
    (dict(source='cifar'), f"'cifar' is not a dataset name ({', '.join(DATASETS)})"),
    (dict(source='mnist', root='nowhere'), "root='nowhere' is not a folder"), (dict(source=3), 'source is a int'),
    (dict(size=0), 'size=0 must be'), (dict(channels=0), 'channels=0 must be'), (dict(stats='digits'), 'no constants'),
    (dict(stats='cifar10'), 'stats are for 3 channels'), (dict(source=(X, Y), fraction=1.), 'fraction=1.0 must'),
    (dict(source=(X, Y), channels=2), 'channels=2 cannot be made of 3'), (dict(test=(X, Y)), 'train is 8x8 with 1'),
    (dict(source=(X, Y), seed=-1), 'seed=-1'), (dict(source=(X, Y), test=(X, Y), fraction=7.), 'fraction=7.0 must'),
    (dict(fraction=.001), 'fraction=0.001 leaves no image of some'),
    (dict(source='nowhere', valid=1.), 'valid=1.0 must lie between 0 and 1')]) # before it is read
def test_arguments_refused(arguments, says):
    with refused(says): load_data(**arguments)

def test_stats():
    assert_close(load_data((X, Y), stats='cifar10').mean.flatten(), torch.tensor([.4914, .4822, .4465]))
    assert_close(load_data((X, Y), stats=([.5]*3, [.25]*3)).std.flatten(), torch.full((3,), .25))
    data = load_data((X, Y))
    x = to_float(data.train.x)
    assert_close(data.mean.flatten(), x.mean((0, 2, 3)), atol=1e-5, rtol=0)
    assert_close(data.std.flatten(), x.std((0, 2, 3), correction=0), atol=1e-5, rtol=0)

# In memory

def test_split_sorts_stably():
    y = torch.tensor([1, 0, 1, 0, 3])
    split = Split(X[:5], y, n_classes=4)
    assert (split.counts, split.starts) == ([2, 2, 0, 1], [0, 2, 4, 4])
    for c, (start, n) in enumerate(zip(split.starts, split.counts)):
        assert_close(split.x[start:start + n], X[:5][y == c])

def test_digest_sees_every_part():
    x, y = X.clone(), Y.clone()
    x[-1, -1, -1, -1] ^= 1
    y[-1] = 0
    pairs = [(X, Y), (x, Y), (X, y)]
    assert len({load_data(train, test=test).digest for train in pairs for test in pairs}) == 9
    data = load_data((X, Y))
    assert data.hold_out(.2).digest == data.to('cpu').digest == data.digest == load_data((X, Y)).hold_out(.2).digest

def test_loading_leaves_the_generator():
    before = torch.get_rng_state()
    load_data((X, Y)).hold_out(.2)
    assert_close(torch.get_rng_state(), before)

def test_image_grid():
    x = X.view(3, 8, 3, 8, 8)
    grid = image_grid(x, cell=20) # twice as large
    assert grid.shape == (3*18, 8*18, 3) and grid.dtype == np.uint8
    np.testing.assert_array_equal(grid[18 + 1:36 - 1:2, 36 + 1:54 - 1:2], x[1, 2].permute(1, 2, 0))
    assert (grid[0] == 255).all() and (grid[17:19] == 255).all() and (grid[:, 17:19] == 255).all()
    np.testing.assert_array_equal(image_grid(to_float(x)), image_grid(x))
    assert image_grid(x[:, :, :1]).shape == image_grid(x[:, :, :2]).shape == (3*66, 8*66)
    assert image_grid(torch.tensor([-9., 9]).view(1, 2, 1, 1, 1), cell=1).tolist()[1] == [255, 0, 255, 255, 255, 255]

def test_nothing_warns(tree):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_data(tree), load_data((LAYOUTS['read-only'], Y)), load_data((X, Y.double()))

@pytest.mark.parametrize('outer, inner', [(('fold1', 'fold2'), ('cat', 'dog')), (('cat', 'dog'), ('train', 'test'))])
def test_two_levels_of_folders_are_not_classes(tmp_path, outer, inner):
    for a in outer:
        for b in inner: write_images(tmp_path/a/b)
    with pytest.raises(ValueError, match=f'holds {", ".join(outer)}, and each of them {", ".join(sorted(inner))}'):
        load_data(tmp_path)
    if outer[0] == 'fold1': assert load_data(tmp_path/'fold1').classes == ['cat', 'dog']

def test_one_folder_in_each_class_is_part_of_it(tmp_path):
    for c in 'ab': write_images(tmp_path/c/'images')
    assert load_data(tmp_path).classes == ['a', 'b']

def test_links_in_a_circle(tmp_path):
    for c in 'ab': write_images(tmp_path/c)
    (tmp_path/'a'/'up').symlink_to(tmp_path)
    with pytest.raises(ValueError, match='a/up is a link to a folder that holds it; remove'): load_data(tmp_path)

def write_images(folder):
    "Four images in a folder"
    folder.mkdir(parents=True)
    for i in range(4): Image.new('RGB', (8, 8), (40*i, 0, 0)).save(folder/f'{i}.png')

def test_a_cache_of_other_images_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv('DREAMPLUS_CACHE', str(tmp_path/'cache'))
    for c in 'ab': write_images(tmp_path/'set'/c)
    want = load_data(tmp_path/'set').train.x
    file, = (tmp_path/'cache'/'folders').glob('*.safetensors')
    state = load_state(file)
    save_state(file, state | dict(x={'0': torch.zeros(8, 3, 4, 4, dtype=torch.uint8)}))
    assert torch.equal(load_data(tmp_path/'set').train.x, want)

@pytest.mark.parametrize('call, kind, says', [
    (lambda data: data.to('tpu'), ValueError, "device='tpu' is not a device name"),
    (lambda data: data.to('cuda:99'), ValueError, 'is not available'),
    (lambda data: data.to([1]), ValueError, 'is not a device name'),
    (lambda data: data.batch('x'), TypeError, 'must be positions'),
    (lambda data: data.select([.9]), TypeError, 'must be class numbers'),
    (lambda data: data.select(['1']), TypeError, 'must be class numbers'),
    (lambda data: data.show(cell='x'), ValueError, "cell='x'"),
    (lambda data: data.show(cell=10**9), ValueError, 'at most 4096'),
    (lambda data: data.show(across=0), ValueError, 'across=0')])
def test_wrong_arguments_of_data(call, kind, says):
    with pytest.raises(kind, match=says): call(load_data(toy_images(2, 8, 8, 1)))

def test_channels_that_images_do_not_have():
    with pytest.raises(ValueError, match='channels=5 cannot be made of 1'):
        load_data(toy_images(2, 8, 8, 1), channels=5)

@pytest.mark.parametrize('make, says', [
    (lambda x, y: (np.ma.masked_array(x, x > 200), y), 'some images are masked'),
    (lambda x, y: (x, np.ma.masked_array(y, y == 1)), 'some labels are masked'),
    (lambda x, y: [(torch.from_numpy(x[0]).to_sparse(), 0)], 'sparse'), (lambda x, y: '', "source='' is empty"),
    (lambda x, y: dict(train=Broken()), 'item 0 of the dataset cannot be read .KeyError: 7.; correct')])
def test_what_would_be_lost_or_is_broken_is_refused(make, says):
    x, y = (t.numpy() for t in toy_images(3, 6))
    with pytest.raises(ValueError, match=says): load_data(make(x, y))

class Broken:
    "A dataset whose code fails"
    def __len__(self): return 3
    def __getitem__(self, i): raise KeyError(7)
