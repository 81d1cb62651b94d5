"Classes, labels, parts and names mean what people think they mean, wherever the data come from."
import json
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, random_split

from dreamplus.cli import main
from dreamplus.core import toy_images, write_json
from dreamplus.data.datasets import DATASETS
from dreamplus.data.sources import load_data
from dreamplus.distilled import DistilledSet, load_distilled
from dreamplus.judge.evaluate import read_result, score
from dreamplus.judge.sets import evaluate_set
from dreamplus.labels import class_names, read_labels, role_of
from dreamplus.labs.doctor import doctor
from dreamplus.loop.distill import distill, resume
from dreamplus.machine import cache_folder
from dreamplus.recipes import METHODS, Method, recipe

X, Y = toy_images(classes=3, per_class=8, channels=3)
PIXELS = X.permute(0, 2, 3, 1).numpy()
NAMES = ['T-shirt/top', 'Trouser', 'a:b'] # no file system holds all of them

@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    "A cache, a home and a working directory for each test"
    monkeypatch.setenv('DREAMPLUS_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    (tmp_path/'here').mkdir(), (tmp_path/'home').mkdir()
    monkeypatch.chdir(tmp_path/'here')

def tree(folder, counts, first=0):
    "Class folders with some images of each class of X; the first pixel of all is `first`"
    for c, (name, n) in enumerate(counts.items()):
        (folder/name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            image = PIXELS[8*c + i].copy()
            image[0, 0] = first
            Image.fromarray(image).save(folder/name/f'{i}.png')
    return folder

def loose(folder):
    "Two images without classes"
    folder.mkdir(parents=True)
    for i in range(2): Image.fromarray(PIXELS[i]).save(folder/f'{i}.png')
    return folder

def quiet(*args, **kw):
    "load_data, which has nothing to say"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return load_data(*args, **kw)

def warned(*parts):
    "One warning that says all of `parts`"
    return pytest.warns(UserWarning, match='.*'.join(parts))

class Items(Dataset):
    "A dataset in memory, with attributes such as class names"
    def __init__(self, y=Y, item=lambda x, c: (x, int(c)), **attributes):
        self.y, self.item = y, item
        vars(self).update(attributes)
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.item(Image.fromarray(PIXELS[i]), self.y[i])

# The parts of a folder

PAIRS = ['train test', 'train val', 'train valid', 'train validation', 'train dev', 'train eval',
         'training testing', 'Train Test', 'TRAIN VAL', 'training_set test_set', 'trainset testset',
         'Training Data|Test Data', 'train2017 val2017', 'trainval test', 'train_images test_images',
         'seg_train seg_test', 'flowers-training flowers-validation']

@pytest.mark.parametrize('pair', PAIRS)
def test_parts_by_their_usual_names(tmp_path, pair):
    train, test = pair.split('|' if '|' in pair else ' ')
    tree(tmp_path/'d'/train, dict(cat=3, dog=2), 10), tree(tmp_path/'d'/test, dict(cat=1, dog=1), 20)
    data = quiet(tmp_path/'d')
    assert (data.classes, data.train.counts, data.test.counts) == (['cat', 'dog'], [3, 2], [1, 1])
    assert {*data.train.x[..., 0, 0].flatten().tolist()} == {10}
    assert {*data.test.x[..., 0, 0].flatten().tolist()} == {20}

def test_the_test_part_comes_before_the_validation_part(tmp_path):
    for name, first in dict(train=10, valid=20, test=30).items(): tree(tmp_path/name, dict(cat=2, dog=2), first)
    with warned('test and valid, of which valid is not used; test is the test split'): data = load_data(tmp_path)
    assert data.test.x[0, 0, 0, 0] == 30 and len(data.train) == 4

@pytest.mark.parametrize('bare', ['loose', 'one folder', 'empty'])
@pytest.mark.parametrize('valid', [True, False])
def test_an_unlabelled_test_part(tmp_path, bare, valid):
    tree(tmp_path/'d'/'train', dict(cat=4, dog=4), 10)
    if valid: tree(tmp_path/'d'/'val', dict(cat=1, dog=1), 20)
    if bare == 'empty': (tmp_path/'d'/'test').mkdir()
    else: loose(tmp_path/'d'/'test'/('' if bare == 'loose' else 'unknown'))
    with warned('test without labels; ' + ('val is the test split' if valid else 'images of train are set aside')):
        data = load_data(tmp_path/'d')
    assert data.classes == ['cat', 'dog'] and data.train.counts == ([4, 4] if valid else [3, 3])
    assert data.test.x[0, 0, 0, 0] == (20 if valid else 10)

def test_only_a_train_part_is_split(tmp_path):
    tree(tmp_path/'training', dict(cat=4, dog=4))
    with warned('holds only training; images of training are set aside'): data = load_data(tmp_path)
    assert (data.train.counts, data.test.counts) == ([3, 3], [1, 1])

def test_folders_around_the_parts(tmp_path):
    "As archives are unpacked: one folder around all, one around each part, and what a Mac adds"
    for part in 'train', 'test': tree(tmp_path/'d'/'flowers'/f'seg_{part}'/f'seg_{part}', dict(cat=2, dog=2))
    junk = tree(tmp_path/'d'/'__MACOSX'/'flowers', dict(cat=0))
    (junk/'cat'/'._0.png').write_bytes(b'x')
    assert quiet(tmp_path/'d').classes == ['cat', 'dog']

@pytest.mark.parametrize('junk', ['__MACOSX', '.ipynb_checkpoints', '@eaDir', 'train/__MACOSX', 'test/.git'])
def test_what_systems_leave_is_no_class(tmp_path, junk):
    for part in 'train', 'test': tree(tmp_path/part, dict(cat=2, dog=2))
    tree(tmp_path/junk, dict(cat=1))
    assert quiet(tmp_path).classes == ['cat', 'dog']

def test_classes_with_the_names_of_parts(tmp_path):
    tree(tmp_path/'a', {'bullet train': 2, 'test tube': 2})
    assert quiet(tmp_path/'a').classes == ['bullet train', 'test tube']
    tree(tmp_path/'b', dict(bus=2, plane=2, train=2)) # as CIFAR-100 has them
    with warned('train holds images and no class folders, so it is a class'): data = load_data(tmp_path/'b')
    assert data.classes == ['bus', 'plane', 'train']

@pytest.mark.parametrize('folders', ['train:p extra:p', 'train:p test:p more:l', 'train:p training:p',
                                     'test:p val:p', 'train:l test:l',
                                     'cat:l dog:l test:l', 'cat:l dog:l val:p', 'train:p Test:p eval:p',
                                     'a_train:p b_test:p',
                                     'train:l val:p'])
def test_folders_that_cannot_be_told(tmp_path, folders):
    for name, kind in (f.split(':') for f in folders.split()):
        tree(tmp_path/'d'/name, dict(cat=2, dog=2)) if kind == 'p' else loose(tmp_path/'d'/name)
    with pytest.raises(ValueError) as e: load_data(tmp_path/'d')
    assert all(f.split(':')[0] in str(e.value) for f in folders.split()) and '\n' not in str(e.value)
    assert not cache_folder().exists()

def test_words_of_a_part():
    for name in 'tests', 'contest', 'latest', 'trains', 'evaluate', 'developer', 'dog':
        assert role_of(name)[0] == '', name

def test_tinyimagenet_as_it_is_unpacked(tmp_path):
    root, ids = tmp_path/'tiny-imagenet-200', ('n01443537', 'n01629819')
    for c, name in enumerate(ids): tree(root/'train'/name, dict(images=3), first=c)
    for part in 'val', 'test':
        folder = root/part/'images'
        folder.mkdir(parents=True)
        for i in range(4): Image.new('RGB', (8, 8), (i, i, i)).save(folder/f'{part}_{i}.png')
    (root/'val'/'val_annotations.txt').write_text(''.join(f'val_{i}.png\t{ids[i % 2]}\t0\t0\t7\t7\n' for i in range(4)))
    with warned('test without labels; val is the test split'): data = load_data(root)
    assert data.classes == [*ids] and data.train.counts == [3, 3]
    assert data.test.x[:, 0, 0, 0].tolist() == [0, 2, 1, 3] and data.test.y.tolist() == [0, 0, 1, 1]
    assert quiet(root/'train', test=root/'val').test.x[:, 0, 0, 0].tolist() == [0, 2, 1, 3]
    (root/'val'/'val_annotations.txt').write_text('val_9.png\tn01443537\n')
    with pytest.raises(ValueError, match=r'val_9.png is missing; val_annotations.txt lists it'):
        with warnings.catch_warnings(action='ignore'): load_data(root)

def test_images_beside_the_class_folders(tmp_path):
    for part in 'train', 'test': tree(tmp_path/part, dict(cat=2, dog=2))
    Image.fromarray(PIXELS[0]).save(tmp_path/'train'/'stray.png')
    with warned('train: 1 images beside the class folders have no class and are left out .stray.png'):
        assert len(load_data(tmp_path).train) == 4

# Dataset names and folders

def test_a_name_that_is_also_a_folder(tmp_path):
    tree(tmp_path/'here'/'digits', dict(cat=4, dog=4))
    with warned("'digits' is read as the name of a dataset; ./digits is the folder"): data = load_data('digits')
    assert data.n_classes == 10
    for source in './digits', tmp_path/'here'/'digits':
        with warned('is not the dataset digits'): assert load_data(source).classes == ['cat', 'dog']
    with warned(f'{tmp_path}/here/digits is the folder'): load_data('digits', root=tmp_path/'here')
    quiet('digits', root=tmp_path)
    with pytest.raises(ValueError, match='^/.*nowhere is not a folder or an .npz file'): load_data(tmp_path/'nowhere')

def test_a_folder_with_the_name_of_a_dataset(tmp_path):
    "has the recipe and the constants of its own images"
    data = {}
    for name in 'cifar100', 'digits', 'photos': tree(tmp_path/name, dict(cat=4, dog=4))
    data['photos'] = quiet(tmp_path/'photos')
    for name in 'cifar100', 'digits':
        with warned(f'{name} is not the dataset {name} .classes 2, not 10', f'called {name}-folder'):
            data[name] = load_data(tmp_path/name)
        assert data[name].name == f'{name}-folder' and torch.equal(data[name].mean, data['photos'].mean)
        for method in 'best', 'idc', 'dm', 'mtt': assert recipe(method, data[name].name) == recipe(method, 'photos')

def test_a_folder_that_holds_a_dataset(tmp_path, monkeypatch):
    "A row holds for a folder of its name if all of its facts do, and is not asked about what the caller changes"
    pets = DATASETS['digits']._replace(reader='', size=8, channels=3, classes=2, train=6, test=2)
    monkeypatch.setitem(DATASETS, 'pets', pets)
    tree(tmp_path/'pets', dict(cat=4, dog=4)), tree(tmp_path/'pets-jpeg', dict(cat=4, dog=4))
    assert quiet(tmp_path/'pets').name == 'pets' and quiet(tmp_path/'pets-jpeg').name == 'pets-jpeg'
    assert quiet(tmp_path/'pets', size=4, channels=1).name == 'pets'
    with warned('train 4, not 6; test 4, not 2'): assert load_data(tmp_path/'pets', fraction=.5).name == 'pets-folder'

@pytest.mark.parametrize('name, why', [('photos', "general arguments, because no dataset is called 'photos'"),
                                       ('digits', "general arguments, because no dataset is called 'digits-folder'")])
def test_the_command_says_which_recipe_is_used(tmp_path, capsys, name, why):
    tree(tmp_path/name, dict(cat=4, dog=4))
    with warnings.catch_warnings(action='ignore'):
        assert main(['plan', str(tmp_path/name), '--method', 'dm', '--width', '8', '--nets', '0']) == 0
    assert f'recipe: {why}\n' in capsys.readouterr().out

# Class names

class Plain:
    "Names in every way"
    ways = [dict(classes=NAMES), dict(classes=tuple(NAMES)), dict(classes=np.array(NAMES)), dict(classes=lambda: NAMES),
            dict(classes={i: c for i, c in enumerate(NAMES)}), dict(classes={c: i for i, c in enumerate(NAMES)}),
            dict(classes={str(i): c for i, c in enumerate(NAMES)}),
            dict(classes=3, class_to_idx={c: i for i, c in enumerate(NAMES)}),
            dict(vocab=NAMES), dict(class_names=[c.encode() for c in NAMES]),
            dict(classes=lambda k: k, categories=NAMES),
            dict(features=dict(image=None, label=SimpleNamespace(names=NAMES)))]

@pytest.mark.parametrize('way', Plain.ways, ids=lambda way: ','.join(f'{k}={type(v).__name__}' for k, v in way.items()))
def test_class_names(way): assert quiet(Items(**way)).classes == NAMES

@pytest.mark.parametrize('classes', [3, None, lambda: 3, (), 'abc'], ids=str)
def test_datasets_without_class_names(classes): assert quiet(Items(classes=classes)).classes == ['0', '1', '2']

def test_class_names_that_say_nothing_certain():
    with pytest.raises(ValueError, match='which has no order'): load_data(Items(classes={*NAMES}))
    with pytest.raises(ValueError, match='label 2 has no name among the 2 classes'): load_data(Items(classes=NAMES[:2]))
    with pytest.raises(ValueError, match='have different classes'):
        load_data(ConcatDataset([Items(classes=NAMES), Items(classes=NAMES[::-1])]))

WHOLE = Items(classes=NAMES)
SOME = {'Subset': Subset(WHOLE, range(0, 24, 2)),
        'Subset of a Subset': Subset(Subset(WHOLE, range(24)), range(0, 24, 3)),
        'random_split': random_split(WHOLE, [18, 6], torch.Generator().manual_seed(0))[0],
        'ConcatDataset': ConcatDataset([WHOLE, WHOLE]),
        'pairs': [(Image.fromarray(p), int(c)) for p, c in zip(PIXELS, Y)], 'arrays': (X, Y),
        'DataLoader': DataLoader(WHOLE, 4)}

@pytest.mark.parametrize('some', SOME)
def test_a_part_beside_the_whole(some):
    for train, test in (SOME[some], WHOLE), (WHOLE, SOME[some]):
        data = quiet(train, test=test)
        assert data.classes == NAMES and sorted((len(data.train), len(data.test)))[-1] >= 24
        for split in data.train, data.test:
            for x, c in zip(split.x, split.y): assert c == next(Y[i] for i in range(24) if torch.equal(X[i], x))

def test_names_in_another_order_are_the_same_classes():
    data = quiet(WHOLE, test=Items(y=2 - Y, classes=NAMES[::-1]))
    assert torch.equal(data.test.x, data.train.x) and torch.equal(data.test.y, data.train.y)

# Labels

@pytest.mark.parametrize('y', [Y[:, None], Y[:, None].numpy(), Y[:, None].numpy().astype('>i4'), Y[:,
                                                                                                   None].tolist(),
                               Y.double()[:, None],
                               Y.bfloat16(), [np.int64(c) for c in Y], Y.numpy().astype('>u2'),
                               [torch.tensor(int(c)) for c in Y]],
                         ids=lambda y: f'{type(y).__name__} {getattr(y, "dtype", "")}')
def test_labels_of_any_form(y):
    assert quiet((X, y)).digest == load_data((X, Y)).digest
    assert quiet(Items(y=y, item=lambda x, c: (x, c))).digest == load_data((X, Y)).digest

@pytest.mark.parametrize('x, y, says', [
    (X, torch.eye(24), r'of shape \(24, 24\)'), (X, [None]*24, 'all labels are -1 or None'), (X, [2**60]*24,
                                                                                              'whole numbers'),
    (X, Y.to_sparse(), 'labels are a tensor that is sparse'), (X, Y.to('meta'),
                                                               'labels are a tensor that is on the meta device'),
    (X.to('meta'), Y, 'images are a tensor that is on the meta device')])
def test_labels_refused(x, y, says):
    with pytest.raises(ValueError, match=says): load_data((x, y))

def test_names_of_labels_with_gaps():
    assert read_labels([4, 2, 4, 9], {9: 'c', 2: 'a', 4: 'b'})[1] == ['a', 'b', 'c']
    assert class_names(Items(classes={9: 'c', 2: 'a'})) == {9: 'c', 2: 'a'}

# Items, dictionaries and files of arrays

def column(name, **kw): return type(name, (), kw)() # as Hugging Face's features

ITEMS = {'image label': {}, 'img fine_label coarse_label id': {}, 'pixel_values labels __key__': {},
         'png cls': {}, 'Image Target': {},
         'scan kind note': dict(features=dict(scan=column('Image'), kind=column('ClassLabel', names=NAMES),
                                              note=column('Value')))}

@pytest.mark.parametrize('keys', ITEMS)
def test_items_that_are_dictionaries(keys):
    image, label, *more = keys.split()
    data = quiet(Items(item=lambda x, c: {image: x, label: int(c)} | dict.fromkeys(more, 7), **ITEMS[keys]))
    assert data.digest == load_data((X, Y)).digest
    assert data.classes == (NAMES if ITEMS[keys] else ['0', '1', '2'])

@pytest.mark.parametrize('item, says', [
    (lambda x, c: dict(image=x, label=c, target=c),
     'item 0: items have image, label, target, and it is not clear which is the label'),
    (lambda x, c: dict(left=x, label=c), 'left, label, and it is not clear which is the image'),
    (lambda x, c: (x, c, c), 'item 0: it is a tuple of length 3'), (lambda x, c: x, 'item 0: it is a Image'),
    (lambda x, c: dict(image=dict(bytes=b'', path=''), label=c), 'item 0: its image is a dict, not decoded')])
def test_items_refused(item, says):
    with pytest.raises(ValueError) as e: load_data(Items(item=item))
    assert says in str(e.value)

NAMED = {'x_train y_train x_test y_test': 2, 'train_images train_labels val_images val_labels': 2,
         'images labels': 1, 'X y': 1, 'trainData trainTargets testData testTargets': 2}

@pytest.mark.parametrize('keys', NAMED)
@pytest.mark.parametrize('file', [False, True])
def test_named_arrays(tmp_path, keys, file):
    y = Y.numpy()[:, None]
    arrays = dict(zip(keys.split(), [PIXELS, y, PIXELS[::4], y[::4]])) | dict(class_names=np.array(NAMES))
    np.savez(tmp_path/'toys.npz', **arrays)
    data = quiet(str(tmp_path/'toys.npz') if file else arrays)
    assert data.classes == NAMES and data.name == ('toys' if file else 'dict')
    same = load_data((X, Y)) if NAMED[keys] == 1 else load_data((X, Y), test=(X[::4], Y[::4]))
    assert data.digest == same.digest
    if file: assert load_data(**data.origin).digest == data.digest

def test_parts_in_a_dictionary():
    unlabelled = Items(y=torch.full((24,), -1), classes=NAMES)
    with warned('test without labels; validation is the test split'):
        data = load_data(dict(train=WHOLE, validation=Subset(WHOLE, [0, 8, 16]), test=unlabelled))
    assert data.classes == NAMES and data.test.counts == [1, 1, 1] and len(data.train) == 24
    keras = quiet(((PIXELS, Y[:, None]), (PIXELS[::4], Y[::4, None])))
    assert keras.digest == load_data((X, Y), test=(X[::4], Y[::4])).digest
    for keys in ('train', 'unsupervised'), ('a', 'b'), ('train', 'training'):
        with pytest.raises(ValueError, match=f'the dictionary holds {keys[0]}, {keys[1]}, which are not one'):
            load_data(dict.fromkeys(keys, WHOLE))
    with pytest.raises(ValueError, match='the dictionary, test: 24 images but 3 labels'):
        load_data(dict(x_train=X, y_train=Y, x_test=X, y_test=Y[:3]))

def test_files_of_arrays_refused(tmp_path):
    (tmp_path/'bad.npz').write_bytes(b'PK\3\4')
    np.savez(tmp_path/'pickled.npz', images=np.array([{}, {}]), labels=[0, 1])
    np.savez(tmp_path/'nameless.npz', PIXELS, Y.numpy())
    for name in 'bad', 'pickled':
        with pytest.raises(ValueError, match=f'{name}.npz cannot be read'): load_data(tmp_path/f'{name}.npz')
    with pytest.raises(ValueError, match='nameless.npz holds arr_0, arr_1, which are not one train part'):
        load_data(tmp_path/'nameless.npz')
    np.savez(tmp_path/'mnist.npz', images=PIXELS, labels=Y.numpy())
    with warned('mnist.npz is not the dataset mnist'): assert load_data(tmp_path/'mnist.npz').name == 'mnist-file'

def test_dataloaders_of_fastai(tmp_path):
    from fastai.vision.all import ImageDataLoaders, Resize
    tree(tmp_path/'d'/'train', dict(ant=8, bee=8, cat=8), 10), tree(tmp_path/'d'/'valid', dict(ant=1, bee=2, cat=1), 20)
    data = quiet(ImageDataLoaders.from_folder(tmp_path/'d', item_tfms=Resize(4), bs=2, num_workers=0))
    same = load_data(tmp_path/'d') # files in another order
    assert data.classes == ['ant', 'bee', 'cat'] and data.test.counts == [1, 2, 1]
    for c in range(3):
        mine, theirs = ({tuple(x.flatten().tolist()) for x in d.train.x[d.train.y == c]} for d in (data, same))
        assert mine == theirs and len(mine) == 8

@pytest.mark.parametrize('dtype', ['>f4', '>f8', '>u1', '<f4'])
def test_byte_orders(dtype):
    scale = 1 if dtype == '>u1' else 255
    assert quiet(((PIXELS/scale).astype(dtype), Y)).digest == load_data((X, Y)).digest

# Out and back

def greys(classes): # class c has its own grey
    x = torch.linspace(0, 1, len(classes)).view(-1, 1, 1, 1, 1).expand(-1, 2, 1, 8, 8)
    return DistilledSet(x, classes, [.5], [.5])

ODD = {'numbers': [str(i) for i in range(12)], 'unsorted': ['dog', 'cat'],
       'fashion': ['T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Bag', 'Ankle boot'],
       'odd': ['..', '.', 'a/b', 'a:b', 'A:B', ' x ', 'ü\n"', '猫', '__MACOSX', '.hidden', 'w'*300],
       'parts': ['test', 'train', 'val'], 'windows': ['aux', 'con.a', 'x'], 'twice': ['crane', 'dog', 'crane']}

@pytest.mark.parametrize('kind', ODD)
def test_classes_travel(tmp_path, kind):
    from torchvision.datasets import ImageFolder
    dset = greys(ODD[kind])
    dset.to_imagefolder(tmp_path/'out')
    folder, C = ImageFolder(tmp_path/'out'), len(dset.classes)
    seen = [round(np.asarray(image)[0, 0, 0]/255*(C - 1)) for image, _ in folder]
    assert seen == folder.targets == dset.labels().tolist()
    listed = json.loads((tmp_path/'out'/'classes.json').read_text())
    assert listed['folders'] == folder.classes
    real = Items(y=torch.arange(24) % C, classes=ODD[kind])
    data = quiet(tmp_path/'out', test=real, size=8, channels=1) # the export beside the original data
    assert data.classes == listed['classes'] == quiet(real).classes
    assert (data.train.x[:, 0, 0, 0]/255*(C - 1)).round().tolist() == data.train.y.tolist() == dset.labels().tolist()
    assert data.test.y.tolist() == sorted(real.y.tolist())

def test_a_class_without_images_travels(tmp_path):
    dset = DistilledSet(torch.rand(3, 1, 8, 8), ['b', 'c', 'a'], [.5], [.5], y=torch.tensor([0, 0, 2]))
    dset.to_imagefolder(tmp_path/'out')
    data = quiet(tmp_path/'out')
    assert data.classes == ['b', 'c', 'a'] and [a + b for a, b in zip(data.train.counts, data.test.counts)] == [2, 0, 1]

def test_soft_labels_in_class_folders(tmp_path):
    soft = DistilledSet(torch.rand(2, 1, 8, 8), ['a', 'b'], [.5], [.5], y=torch.tensor([[.9, .1], [.2, .8]]))
    with warned('hold the most probable class of each image'): soft.to_imagefolder(tmp_path/'out')

def test_a_long_tail_says_which_rows_are_missing():
    data = quiet((X[:13], Y[:13]), test=(X[:16], Y[:16])) # 8 and 5 images
    dset = DistilledSet(torch.rand(2, 8, 3, 8, 8), ['0', '1'], [.5]*3, [.5]*3)
    dset.evaluation.update(arch='convnet', width=8, norm='instance', augment='', mix=0.)
    with warned("random: class '1' has 5 of 8 real images"):
        rows = score(dset, data, n=1, rows=('distilled', 'random', 'full'), steps=1, epochs=0)
    assert [row['set'] for row in rows] == ['distilled', 'full']

def test_a_list_of_classes_that_does_not_fit(tmp_path):
    greys(['b', 'a']).to_imagefolder(tmp_path/'out')
    tree(tmp_path/'out', dict(more=1))
    with pytest.raises(ValueError, match='classes.json does not list the class folders of .*: more; restore'):
        load_data(tmp_path/'out')
    write_json(tmp_path/'out'/'classes.json', dict(folders=['../../etc', '0_b', '1_a', 'more'], classes=[*'abcd']))
    with pytest.raises(ValueError, match='once each: ../../etc'): load_data(tmp_path/'out')
    other = tree(tmp_path/'other', dict(b=2, a=2))
    write_json(other/'classes.json', dict(a=1))
    with warned('does not list folders and classes, so classes are sorted by name'):
        assert load_data(other).classes == ['a', 'b']

# Numbers of NumPy, and ~

TINY = dict(width=8, batch_real=4, log=None)

def test_numbers_of_numpy(tmp_path):
    data = quiet((X, Y), seed=np.int64(0), fraction=np.float32(.25), size=np.int16(8))
    assert data.digest == load_data((X, Y), fraction=.25).digest
    held = data.hold_out(np.float64(.5), np.int64(1))
    same = distill(held, 'dm', [1, 2, 1], seed=1, outer=2, lr=.5, **TINY)
    for n, ipc in enumerate((np.array([1, 2, 1]), [np.int64(1), np.int32(2), 1])):
        dset = distill(held, 'dm', ipc, seed=np.int64(1), outer=np.int64(2), lr=np.float64(.5),
                       out=tmp_path/f'{n}', **TINY)
        assert torch.equal(dset.pixels, same.pixels) and dset.provenance['args'] == same.provenance['args']
        assert json.loads((tmp_path/f'{n}'/'run.json').read_text())['data']['held'] == [.5, 1]
    half = np.float64(1.5)
    for args in dict(ipc=1.5), dict(ipc=half), dict(outer=half), dict(seed=half), dict(lr=np.str_('a')):
        with pytest.raises(ValueError, match=f'^{next(iter(args))}=') as e: distill(data, 'dm', **args, **TINY)
        assert 'np.' not in str(e.value)

def test_a_method_with_numbers_of_numpy(monkeypatch):
    monkeypatch.setitem(METHODS, 'mine', Method(base='dm', lr=np.float64(.5), outer=np.int64(3)))
    args = recipe('mine', 'digits')
    assert (type(args['lr']), type(args['outer']), args['lr'], args['outer']) == (float, int, .5, 3)

@pytest.mark.parametrize('kind', [list, tuple, np.array, torch.tensor, lambda ids: [*np.array(ids)]])
def test_classes_by_numbers_of_numpy(kind):
    "A number is a number also where the names of the classes are numbers"
    dset = DistilledSet(torch.rand(3, 1, 8, 8), ['2', '0', '1'], [.5], [.2], y=torch.arange(3))
    assert dset.select(kind([1, 2])).classes == ['0', '1']

def test_a_folder_with_the_longest_name(tmp_path, capsys):
    "of 255 bytes: caches and run folders have longer names"
    name = '数'*85
    tree(tmp_path/name, dict(cat=4, dog=4))
    out = main(['distill', str(tmp_path/name), *'--method dm --steps 1 --nets 0 --width 8'.split()])
    assert out == 0 and name in capsys.readouterr().out and len(os.listdir(tmp_path/'here'/'runs')) == 1
    best = dict(bank_nets=1, bank_stages='1', stat_images=2)
    assert distill(quiet(tmp_path/name), 'best', outer=1, width=8, log=None, **best).counts == [1, 1]

def test_the_home_folder(tmp_path, monkeypatch):
    home = tmp_path/'home'
    tree(home/'toys', dict(cat=4, dog=4))
    data = quiet('~/toys')
    assert data.digest == quiet('toys', root='~').digest and data.origin['source'] == str(home/'toys')
    dset = distill(data, 'dm', outer=1, out='~/run', **TINY)
    assert torch.equal(load_distilled('~/run').pixels, dset.pixels) and (home/'run'/'run.json').exists()
    dset.save('~/set'), dset.to_imagefolder('~/images')
    brief = dict(n=1, rows=('distilled',), epochs=0, steps=1)
    evaluate_set('~/set', data, out='~/set.json', **brief), evaluate_set('~/run', **brief)
    assert read_result('~/run')['method'] == 'dm' and 'data' not in doctor('~/run').skipped
    assert {'run', 'set', 'images', 'set.json'} <= {*os.listdir(home)} and not os.listdir(tmp_path/'here')
    os.rename(home/'toys', home/'moved')
    assert resume('~/run', root='~/moved', log=None).provenance['steps'] == dset.provenance['steps']
    monkeypatch.setenv('DREAMPLUS_CACHE', '~/cache')
    assert cache_folder() == home/'cache'
