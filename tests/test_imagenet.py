"Large sets, on small trees of their shape: prepared once, killed and continued, mapped into memory."
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Process
from torch.testing import assert_close

from dreamplus.core import read_json, toy_images
from dreamplus.data import core as containers
from dreamplus.data import imagenet, reading
from dreamplus.data.core import ImageRows, Split
from dreamplus.data.datasets import DATASETS
from dreamplus.data.imagenet import PreparedSet
from dreamplus.data.sources import load_data
from dreamplus.machine import cache_folder

SUBSETS = {name: row.subset for name, row in DATASETS.items() if row.subset}
IDS = [f'n{i:08}' for i in range(1000)]

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('DREAMPLUS_CACHE', str(tmp_path/'cache'))

def save(path, x, shape=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(x.permute(1, 2, 0).numpy())
    image.resize(shape or image.size).save(path)
    return path

def write_tree(root, ids, train=3, val=2, size=8):
    x = toy_images(len(ids), train + val, size, channels=3)[0].unflatten(0, (len(ids), -1))
    for c, images in zip(ids, x):
        for i, image in enumerate(images):
            save(root/('train' if i < train else 'val')/c/f'{c}_{i}.JPEG', image, (size + i, size + 2))
    return root

@pytest.fixture(scope='module')
def thousand(tmp_path_factory): return write_tree(tmp_path_factory.mktemp('thousand'), IDS, train=1, val=1, size=4)

@pytest.fixture
def ten(tmp_path, monkeypatch):
    monkeypatch.setattr(PreparedSet, 'block', 4)
    return write_tree(tmp_path/'ten', SUBSETS['imagenet10'])

def files(): return {p.name: p.read_bytes() for p in (cache_folder()/'prepared').rglob('*') if p.is_file()}
def prepared(): return {name: there for name, there in files().items() if name[0] != '.'}

def pixels(path, size, squash=False):
    "An image as Pillow resizes and crops it"
    image = Image.open(path).convert('RGB')
    w, h = image.size
    image = image.resize((size, size) if squash else (round(w*size/min(w, h)), round(h*size/min(w, h))),
                         Image.Resampling.BILINEAR)
    left, top = (image.width - size)//2, (image.height - size)//2
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)

# What the names mean

def test_class_lists_name_what_they_say():
    from torchvision.models import ResNet18_Weights
    names = ResNet18_Weights.DEFAULT.meta['categories']
    called = {name: [names[i] for i in s] for name, s in SUBSETS.items() if isinstance(s[0], int)}
    assert {'tench', 'church', 'parachute'} <= {*called['imagenette']}
    assert {'golden retriever', 'beagle', 'dingo'} & {*called['imagewoof']}
    assert {'tabby', 'tiger', 'lion'} <= {*called['imagemeow']}
    assert {'peacock', 'flamingo', 'goose'} & {*called['imagesquawk']}
    assert {'pineapple', 'banana', 'strawberry'} <= {*called['imagefruit']}
    assert {'bee', 'banana', 'lemon', 'corn', 'school bus'} <= {*called['imageyellow']}

@pytest.mark.parametrize('name', ['imagewoof', 'imageyellow']) # whose classes do not sort as the folders
def test_labels_are_places_in_the_list(thousand, name):
    data = load_data(name, root=thousand, size=4)
    assert data.classes == [IDS[i] for i in SUBSETS[name]]
    assert data.train.counts == data.test.counts == [1]*10
    place = 3
    wnid = IDS[SUBSETS[name][place]]
    assert_close(data.train.x[place], pixels(thousand/'train'/wnid/f'{wnid}_0.JPEG', 4, squash=True), atol=1, rtol=0)

def test_thousand_classes(thousand):
    data = load_data('imagenet', root=thousand, size=4)
    assert (data.n_classes, len(data.train), len(data.test)) == (1000, 1000, 1000)
    assert data.classes == IDS and data.train.starts == [*range(1000)]
    assert_close(data.mean.flatten(), torch.tensor(DATASETS['imagenet'].mean))

@pytest.mark.parametrize('resize', ['crop', 'squash'])
def test_resizing_is_that_of_pillow(ten, resize):
    data = load_data('imagenet10', root=ten, size=6, resize=resize)
    wnid = SUBSETS['imagenet10'][4]
    for i in range(3):
        path = ten/'train'/wnid/f'{wnid}_{i}.JPEG'
        assert_close(data.train.x[12 + i], pixels(path, 6, resize == 'squash'), atol=1, rtol=0)

def test_sizes_and_ways_of_the_papers(ten, thousand):
    shapes = {name: (row.size, row.resize) for name, row in DATASETS.items() if 'imagenet' in row.reader}
    idc, small = ('imagenet10', 'imagenet100'), ('tinyimagenet', 'imagenet')
    assert {name: shapes.pop(name) for name in idc} == dict.fromkeys(idc, (224, 'crop'))
    assert {name: shapes.pop(name) for name in small} == dict.fromkeys(small, (64, 'crop'))
    assert shapes == dict.fromkeys(('imagenette', 'imagewoof', 'imagemeow', 'imagesquawk', 'imagefruit', 'imageyellow'),
                                   (128, 'squash'))
    assert load_data('imagenet10', root=ten).size == 224
    assert load_data('imagenette', root=thousand).size == 128

def test_a_hundred_classes_by_name(tmp_path):
    write_tree(tmp_path/'imagenet', SUBSETS['imagenet100'], train=1, val=1)
    data = load_data('imagenet100', root=tmp_path, size=8) # the tree lies in root
    assert data.classes == [*SUBSETS['imagenet100']] and data.train.counts == [1]*100

def test_grey_and_cmyk_become_colour(ten):
    paths = sorted((ten/'train'/SUBSETS['imagenet10'][0]).iterdir())
    for path, mode in zip(paths, ('L', 'CMYK')): Image.open(path).convert(mode).save(path)
    x = load_data('imagenet10', root=ten, size=8).train.x
    assert_close(x[0, 0], x[0, 2])
    assert_close(x[1], pixels(paths[1], 8), atol=2, rtol=0)

# TinyImageNet

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "The same images as a tree with annotations, as class folders, and as one file"
    root = tmp_path_factory.mktemp('tiny')
    listed, ids = root/'zip'/'tiny-imagenet-200', IDS[:200]
    x = toy_images(200, 3, 4, channels=3)[0].unflatten(0, (200, 3))
    for c, wnid in enumerate(ids):
        for i in range(2): save(listed/'train'/wnid/'images'/f'{wnid}_{i}.JPEG', x[c, i])
        save(listed/'val'/'images'/f'val_{c}.JPEG', x[c, 2])
        (root/'sorted'/'val'/wnid/'images').mkdir(parents=True)
        shutil.copy(listed/'val'/'images'/f'val_{c}.JPEG', root/'sorted'/'val'/wnid/'images')
    rows = [f'val_{c}.JPEG\t{wnid}\t0\t0\t3\t3\n' for c, wnid in enumerate(ids)]
    (listed/'val'/'val_annotations.txt').write_text(''.join(rows[::-1]))
    (root/'sorted'/'train').symlink_to(listed/'train')
    decode = lambda path: torch.from_numpy(np.array(Image.open(path).convert('RGB'))).permute(2, 0, 1)
    train = torch.stack([decode(listed/'train'/c/'images'/f'{c}_{i}.JPEG') for c in ids for i in range(2)])
    val = torch.stack([decode(listed/'val'/'images'/f'val_{c}.JPEG') for c in range(200)])
    where = torch.arange(400).view(200, 2).T.flatten() # not sorted by class
    torch.save(dict(images_train=train[where], labels_train=torch.arange(400)[where]//2, images_val=val,
                    labels_val=torch.arange(200), classes=ids), root/'tinyimagenet.pt')
    return root

def test_all_forms_are_equal(tiny):
    annotated, folders, file = (load_data('tinyimagenet', root=tiny/at, size=4) for at in ('zip', 'sorted', '.'))
    assert annotated.digest == folders.digest == file.digest
    assert annotated.classes == folders.classes == file.classes == IDS[:200]
    assert annotated.train.counts == [2]*200 and annotated.test.counts == [1]*200
    assert_close(annotated.mean, file.mean)
    assert load_data('tinyimagenet', root=tiny, size=4, channels=1).train.x.shape == (400, 1, 4, 4)

@pytest.mark.parametrize('legacy', [False, True])
def test_file_is_read_without_unpickling_code(tmp_path, legacy):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'done'),)
    torch.save(dict(classes=Evil()), tmp_path/'tinyimagenet.pt', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match='tinyimagenet.pt cannot be read'): load_data('tinyimagenet', root=tmp_path)
    assert not (tmp_path/'done').exists()

@pytest.mark.parametrize('change, says', [(dict(classes=IDS[:9]), 'of 200 classes'),
                                          (dict(images_val=None), 'images must be|numbers'),
                                          (dict(labels_train=torch.zeros(3)), '400 images but 3 labels')])
def test_file_refused(tiny, tmp_path, change, says):
    torch.save(torch.load(tiny/'tinyimagenet.pt') | change, tmp_path/'tinyimagenet.pt')
    with pytest.raises(ValueError, match=says): load_data('tinyimagenet', root=tmp_path)

@pytest.mark.parametrize('row, says', [('val_9999.JPEG\tn00000000', 'val_9999.JPEG is missing'),
                                       ('val_0.JPEG\tn77777777', "class 'n77777777' is not in both")])
def test_annotations_refused(tiny, tmp_path, row, says):
    whole, val = tiny/'zip'/'tiny-imagenet-200', tmp_path/'val'
    val.mkdir()
    for part in 'train', 'val/images': (tmp_path/part).symlink_to(whole/part)
    rows = (whole/'val'/'val_annotations.txt').read_text()
    (val/'val_annotations.txt').write_text(f'{rows}{row}\n')
    with pytest.raises(ValueError, match=says): load_data('tinyimagenet', root=tmp_path)

# Prepared once

@pytest.fixture
def decoded(monkeypatch):
    "The paths that are decoded from here on"
    paths, decode = [], reading.decode_file
    monkeypatch.setattr(reading, 'decode_file', lambda path, fit: (paths.append(path), decode(path, fit))[1])
    return paths

def test_second_load_opens_no_image(ten, decoded, monkeypatch):
    first = load_data('imagenet10', root=ten, size=8)
    assert len(decoded) == 50
    monkeypatch.setattr(imagenet, 'file_digests', None)
    monkeypatch.setattr(containers, 'fingerprint', None)
    again = load_data('imagenet10', root=ten, size=8, valid=.3)
    assert len(decoded) == 50 and again.digest == first.digest
    assert {*prepared()} == {'set.json', 'train.u8', 'val.u8'}

def test_files_are_the_pixels(ten):
    data = load_data('imagenet10', root=ten, size=8)
    assert prepared()['train.u8'] == data.train.x.numpy().tobytes()
    assert prepared()['val.u8'] == data.test.x.numpy().tobytes()

def die_at(ten, where, count):
    "Load, and be killed at the `count`-th call of `where`"
    os.environ['DREAMPLUS_CACHE'] = str(ten.parent/'cache')
    PreparedSet.block = 4
    module = next(m for m in (os, reading, imagenet) if hasattr(m, where))
    real, calls = getattr(module, where), []
    def deadly(*args, **kwargs):
        calls.append(None)
        if len(calls) == count: os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, where, deadly)
    return load_data('imagenet10', root=ten, size=8).digest

@pytest.mark.parametrize('where, count, spared', [('decode_file', 39, 38), ('fsync', 3, 4), ('write_json', 6, 20),
                                                  ('replace', 9, 28), ('replace', 16, 50)])
def test_killed_and_continued(ten, decoded, where, count, spared):
    assert Process(die_at, ten, where, count).end() == (None, -signal.SIGKILL)
    assert 'digest' not in read_state()
    data = load_data('imagenet10', root=ten, size=8)
    assert len(decoded) == 50 - spared
    there = prepared()
    shutil.rmtree(cache_folder())
    assert load_data('imagenet10', root=ten, size=8).digest == data.digest
    assert prepared() == there

def read_state():
    path = next(cache_folder().rglob('set.json'), None)
    return read_json(path) if path else {}

def test_two_at_once(ten):
    answers = [p.end() for p in [Process(die_at, ten, 'decode_file', 999) for _ in range(2)]]
    assert answers[0] == answers[1] == (load_data('imagenet10', root=ten, size=8).digest, 0)

@pytest.mark.parametrize('change, again', [('add', 31), ('remove', 29), ('replace', 30), ('add to the end', 21),
                                           ('touch the folder', 0), ('touch a file', 0), ('overwrite', 30),
                                           ('lose', 20), ('truncate', 20), ('damage', 50)])
def test_a_change_is_seen(ten, decoded, change, again):
    before = load_data('imagenet10', root=ten, size=8)
    first, last = (ten/part/SUBSETS['imagenet10'][i] for part, i in (('train', 0), ('val', 9)))
    image = next(first.iterdir())
    if change == 'add': shutil.copy(image, first/'a.jpg')
    if change == 'remove': image.unlink()
    if change == 'replace': os.replace(shutil.copy(sorted(last.iterdir())[0], ten/'new'), image)
    if change == 'add to the end': shutil.copy(image, last/'z.jpg')
    if change == 'touch the folder': os.utime(first, ns=(0, 0))
    if change == 'touch a file': os.utime(image, ns=(0, 0))
    if change == 'overwrite': # with as many bytes, and set the times back
        about = image.stat()
        Image.new('L', (8, 8)).save(image, 'JPEG', quality=10)
        image.write_bytes(image.read_bytes().ljust(about.st_size, b'\0'))
        assert image.stat().st_size == about.st_size
        os.utime(image, ns=(about.st_atime_ns, about.st_mtime_ns))
    if change == 'lose': next(cache_folder().rglob('val.u8')).unlink()
    if change == 'truncate': os.truncate(next(cache_folder().rglob('val.u8')), 100)
    if change == 'damage': next(cache_folder().rglob('set.json')).write_text('{')
    pixels = before.train.x.clone()
    decoded.clear()
    after = load_data('imagenet10', root=ten, size=8)
    assert_close(before.train.x, pixels) # whoever has mapped the old file keeps it
    assert len(decoded) == again
    assert (after.digest != before.digest) == (change in ('add', 'remove', 'replace', 'add to the end', 'overwrite'))
    there = prepared()
    shutil.rmtree(cache_folder())
    assert load_data('imagenet10', root=ten, size=8).digest == after.digest
    assert all(prepared()[part] == there[part] for part in ('train.u8', 'val.u8'))

def test_a_damaged_image_is_named_and_costs_a_block(ten, decoded):
    bad = sorted((ten/'train'/SUBSETS['imagenet10'][5]).iterdir())[1] # the 17th
    whole = bad.read_bytes()
    bad.write_bytes(whole[:200])
    with pytest.raises(ValueError, match=f'{bad.name} cannot be decoded'): load_data('imagenet10', root=ten, size=8)
    bad.write_bytes(whole)
    decoded.clear()
    load_data('imagenet10', root=ten, size=8)
    assert len(decoded) == 50 - 16

def test_progress(ten, capsys):
    load_data('imagenet10', root=ten, size=8)
    assert capsys.readouterr().out == ''
    load_data('imagenet10', root=ten, size=6, progress=True)
    assert '8/8' in capsys.readouterr().err # blocks of train

def test_tree_is_only_read(ten):
    before = sorted(ten.rglob('*'))
    for p in [ten, *before]: p.chmod(0o555 if p.is_dir() else 0o444)
    try: load_data('imagenet10', root=ten, size=8)
    finally:
        for p in [ten, *before]: p.chmod(0o755)
    assert sorted(ten.rglob('*')) == before

# What is refused, and with which remedy

LAYOUT = 'train/<wnid>/*.JPEG and val/<wnid>/*.JPEG'

@pytest.mark.parametrize('name', ['tinyimagenet', 'imagenet', 'imagenet100', 'imagewoof'])
def test_missing_root(name, tmp_path):
    layout = 'tinyimagenet.pt, or train/<wnid>/images/*.JPEG' if name[0] == 't' else LAYOUT
    for root, says in (None, 'dreamplus does not download it'), (tmp_path, 'has no train and val'):
        with pytest.raises(ValueError) as e: load_data(name, root=root)
        assert f'{name} needs root= (--root)' in str(e.value) and layout in str(e.value) and says in str(e.value)

def spoil(root, what):
    if what == 'val is flat':
        for folder in (root/'val').iterdir():
            for f in folder.iterdir(): shutil.move(f, root/'val')
            folder.rmdir()
    if what == 'a class is missing': shutil.rmtree(root/'val'/SUBSETS['imagenet10'][3])
    if what == 'a class is empty':
        for f in (root/'train'/SUBSETS['imagenet10'][3]).iterdir(): f.unlink()

@pytest.mark.parametrize('what, says', {
    'val is flat': ['and 9 more folders are missing', LAYOUT],
    'a class is missing': ['n02107142 is missing', LAYOUT],
    'a class is empty': ['n02107142 holds no images', 'put the images']}.items())
def test_trees_refused(ten, what, says):
    spoil(ten, what)
    with pytest.raises(ValueError) as e: load_data('imagenet10', root=ten, size=8)
    assert all(s in str(e.value) for s in says)
    assert not cache_folder().exists()

@pytest.mark.parametrize('name, n', [('imagenet', 1000), ('imagenette', 1000), ('tinyimagenet', 200)])
def test_wrong_number_of_classes(ten, name, n):
    with pytest.raises(ValueError, match=f'{name} needs {n} class folders, but .*train has 10; add the missing ones'):
        load_data(name, root=ten)
    assert load_data(ten, size=8).n_classes == 10 # as the error says

@pytest.mark.parametrize('why', ['no room', 'a file is in the way'])
def test_cache_that_cannot_be_written(ten, tmp_path, monkeypatch, why):
    if why == 'no room': monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=100))
    else: (tmp_path/'cache').write_text('in the way')
    with pytest.raises(ValueError, match='set DREAMPLUS_CACHE to a folder with'): load_data('imagenet10', root=ten)
    assert not [*tmp_path.glob('cache/**/*.part')]

# In memory or not

def test_mapped_equals_in_memory(ten):
    mapped = load_data('imagenet10', root=ten, size=8)
    whole = load_data((mapped.train.x.clone(), mapped.train.y), test=(mapped.test.x.clone(), mapped.test.y))
    assert mapped.digest == whole.digest
    i = torch.tensor([[0, 29], [7, 7]])
    assert_close(mapped.train.x[i], whole.train.x[i])
    assert mapped.train.x.untyped_storage().nbytes() == 30*3*64

@pytest.fixture
def no_room(monkeypatch): monkeypatch.setattr(containers, '_fits', lambda x, device: False)

def test_nothing_is_copied_without_room(ten, no_room):
    data = load_data('imagenet10', root=ten, size=8)
    held = data.hold_out(.3)
    for split in held.train, held.valid:
        assert isinstance(split.x, ImageRows)
        assert split.x.pixels.data_ptr() == data.train.x.data_ptr()
    assert held.digest == data.digest
    assert held.to('cpu').train.x.pixels.data_ptr() == data.train.x.data_ptr()

def test_held_out_is_the_same_with_and_without_room(ten, monkeypatch):
    data = load_data('imagenet10', root=ten, size=8)
    there = data.hold_out(.3)
    monkeypatch.setattr(containers, '_fits', lambda x, device: False)
    rows = data.hold_out(.3)
    for a, b in (there.train, rows.train), (there.valid, rows.valid):
        assert_close(a.x, b.x[:]), assert_close(a.y, b.y)
        assert (a.counts, a.starts, len(a)) == (b.counts, b.starts, len(b))
    assert_close(there.with_stats(None).mean, rows.with_stats(None).mean)

def test_unsorted_without_room(no_room):
    x, y = toy_images(4, 5)
    order = torch.randperm(20)
    rows, split = Split(x[order], y[order], 4), Split(x, y, 4)
    assert isinstance(rows.x, ImageRows) and rows.counts == split.counts
    assert_close(rows.x[:].flatten(1).sum(1).view(4, 5).sort()[0], x.flatten(1).sum(1).view(4, 5).sort()[0])

@pytest.mark.parametrize('fits', [True, False])
def test_moving_to_another_device(monkeypatch, fits):
    monkeypatch.setattr(containers, '_fits', lambda x, device: fits)
    split = Split(*toy_images(3, 4), 3).to('meta') # a device that every machine has
    assert split.x.device.type == split.y.device.type == 'meta'
    assert isinstance(split.x, ImageRows) != fits
    if not fits: assert split.x.pixels.device.type == 'cpu' and split.to('meta').x.pixels is split.x.pixels

def test_the_rule_for_room():
    import psutil
    third = psutil.virtual_memory().total/3
    sized = lambda n: torch.empty(1, dtype=torch.uint8).expand(int(n))
    assert containers._fits(sized(.99*third), 'cpu') and not containers._fits(sized(1.01*third), 'cpu')

def test_too_many_for_a_tensor(ten, no_room):
    x = load_data('imagenet10', root=ten, size=8, valid=.3).train.x
    with pytest.raises(ValueError, match='too many for one tensor'): containers.to_float(x)

def test_distilling_is_the_same(ten, no_room):
    from dreamplus.loop.distill import distill
    mapped = load_data('imagenet10', root=ten, size=8, valid=.3)
    x, y = mapped.train.x[:].clone(), mapped.train.y
    whole = load_data((x, y), test=(mapped.test.x, mapped.test.y), stats='imagenet')
    whole.name = mapped.name # which names the recipe
    args = dict(method='dream+', ipc=1, arch='convnet', width=8, factor=1, outer=2, inner=2, n_data=8, batch_real=2,
                interval=1, net_batch=4, warm_epochs=0, seed=0, log=None)
    assert_close(distill(mapped, **args).pixels, distill(whole, **args).pixels, rtol=0, atol=0)
