"Sets of other programs, each file of the exact shape that its code writes; exports, each read by its tool or by hand."
import io
import json
import re
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder

from dreamplus.cli import main
from dreamplus.core import Key, read_json, toy_images
from dreamplus.data.core import to_float
from dreamplus.data.sources import load_data
from dreamplus.data.whiten import whitened
from dreamplus.distilled import DistilledSet, load_distilled
from dreamplus.data import formats
from dreamplus.exchange.writers import WRITERS, training_code
from dreamplus.judge.evaluate import score
from dreamplus.judge.protocols import PROTOCOLS, protocol_args
from dreamplus.judge.sets import evaluate_set
from dreamplus.labs.leaderboard import leaderboard
from dreamplus.loop.distill import distill
from dreamplus.recipes import METHODS, recipe
from dreamplus.synthetic import start_pixels

C, ipc, MANY = 10, 2, 12 # with 12 classes, 10 sorts before 2
Y = torch.arange(C).repeat_interleave(ipc)
CIFAR = [torch.tensor(s).view(3, 1, 1) for s in ((.4914, .4822, .4465), (.2023, .1994, .2010))]

@pytest.fixture
def x(): return torch.rand(C*ipc, 3, 8, 8)

@pytest.fixture(scope='module')
def data(): return load_data(toy_images(MANY, 30, 8, 3))

def vico(folder, x, name='res_DC_CIFAR10_ConvNet_2ipc.pt'):
    "As DC's main.py: images normalised, numbers of NumPy, one pair for each experiment"
    torch.save({'data': [[x*0, Y], [(x - CIFAR[0])/CIFAR[1], Y]],
                'accs_all_exps': {'ConvNet': [np.float64(.5), np.float32(.25)]}}, folder/name)
    return folder/name

def mtt(folder, x, suffix='best', labels=Y, lr=None):
    "As distill.py of MTT, and DATM with logits and a learning rate"
    parts = dict(images=x, labels=labels) | ({} if lr is None else dict(lr=torch.tensor(lr, requires_grad=True)))
    for name, value in parts.items(): torch.save(value, folder/(f'{name}_{suffix}.pt' if suffix else f'{name}.pt'))
    return folder

# Import

def test_dc_dsa_dm(tmp_path, x):
    dset = load_distilled(vico(tmp_path, x))
    torch.testing.assert_close(dset.pixels, x)
    assert (dset.provenance['method'], dset.counts) == ('dc', [2]*C)
    assert dset.mean == pytest.approx([.4914, .4822, .4465])
    assert not load_distilled(vico(tmp_path, x), experiment=0).pixels.eq(dset.pixels).all()
    assert 'experiment=1 (0 to 1 exist; experiment= selects another)' in dset.provenance['assumed']

def test_a_name_that_says_nothing_asks_for_constants(tmp_path, x):
    path = vico(tmp_path, x, 'mine.pt')
    with pytest.raises(ValueError, match='constants of the normalisation are not known'): load_distilled(path)
    for how in dict(stats='cifar10'), dict(data='cifar10'), dict(stats=[s.flatten() for s in CIFAR]):
        torch.testing.assert_close(load_distilled(path, **how).pixels, x)

def test_the_suffix_may_lie(tmp_path, x):
    torch.testing.assert_close(load_distilled(vico(tmp_path, x, 'res_DM_CIFAR10_x.bin')).pixels, x)

def test_mtt(tmp_path, x):
    mtt(tmp_path, x*0, 4000), mtt(tmp_path, x*0 + 1, 12000)
    mtt(tmp_path, (x - CIFAR[0])/CIFAR[1])
    with pytest.raises(ValueError, match='normalised or whitened must be known; give values=normalised'):
        load_distilled(tmp_path)
    for path in tmp_path, tmp_path/'images_best.pt':
        torch.testing.assert_close(load_distilled(path, 'cifar10', values='normalised').pixels, x)
    (tmp_path/'images_best.pt').unlink()
    assert load_distilled(tmp_path, 'cifar10', values='unit').pixels.eq(1).all() # the last iteration

def test_what_is_said_of_a_learned_rate_is_true(tmp_path, x):
    dset = load_distilled(mtt(tmp_path, x, lr=.02), 'cifar10', values='unit')
    says = 'the learned rate is 0.02, which only the protocol paper uses, for mtt and tesla'
    assert says in dset.provenance['assumed']
    use_it = {(protocol, method.family) for protocol in PROTOCOLS for method in METHODS.values() if protocol_args(
        protocol, dset.evaluation | dict(paper=method.family), 'cifar10')['lr'] == pytest.approx(.02)}
    assert use_it == {('paper', 'mtt'), ('paper', 'tesla')}

def test_mtt_normalises_cifar100_as_cifar10(tmp_path, x):
    dset = load_distilled(mtt(tmp_path, (x - CIFAR[0])/CIFAR[1]), 'cifar100', values='normalised')
    torch.testing.assert_close(dset.pixels, x)
    assert dset.mean == pytest.approx([.4914, .4822, .4465]) and len(dset.classes) == 100

def test_whitened_images(tmp_path, x, data):
    mtt(tmp_path, whitened(data).normalize(x), lr=.03)
    with pytest.raises(ValueError, match='whitening is inverted with the real images'):
        load_distilled(tmp_path, values='whitened')
    dset = load_distilled(tmp_path, data, values='whitened')
    torch.testing.assert_close(dset.pixels, x, atol=1e-3, rtol=0)
    assert dset.evaluation['zca'] and dset.evaluation['lr'] == pytest.approx(.03)
    torch.save(x, tmp_path/'images_zca_best.pt') # MTT's own un-whitened copy needs no data
    again = load_distilled(tmp_path)
    assert torch.equal(again.pixels, x) and again.evaluation['zca']

def test_datm_labels_are_logits(tmp_path, x):
    logits = 3*torch.randn(len(x), C)
    y = load_distilled(mtt(tmp_path, x, labels=logits), values='unit', stats='cifar10').y
    owner = logits.argmax(1).argsort(stable=True)
    torch.testing.assert_close(y, logits.softmax(1)[owner])

def test_tesla_labels_are_probabilities(tmp_path, x):
    soft = torch.randn(len(x), C).softmax(1)
    y = load_distilled(mtt(tmp_path, x, labels=soft), values='unit', stats='cifar10').y
    torch.testing.assert_close(y, soft[soft.argmax(1).argsort(stable=True)])

def test_ddranking_without_labels(tmp_path, x):
    mtt(tmp_path, x, '')
    (tmp_path/'labels.pt').unlink()
    with pytest.raises(ValueError, match='20 images have no labels'):
        load_distilled(tmp_path, values='unit', stats='cifar10')
    assert torch.equal(load_distilled(tmp_path, values='unit', stats='cifar10', classes=C).y, Y)

@pytest.mark.parametrize('name', ['data.pt', 'data20.pt', 'data_1000.pt'])
def test_idc_dream_ncfm(tmp_path, x, name):
    torch.save([x.requires_grad_(), Y], tmp_path/name)
    with pytest.raises(ValueError, match='the factor must be known; give factor=1'):
        load_distilled(tmp_path/name, 'cifar10')
    dset = load_distilled(tmp_path/name, 'cifar10', factor=2)
    assert (dset.factor, dset.images().shape, dset.provenance['method']) == (2, (80, 3, 8, 8), 'idc')
    (tmp_path/'args.txt').write_text(json.dumps(dict(factor=3, decode_type='multi', dataset='cifar10')))
    assert (load_distilled(tmp_path/name).factor, load_distilled(tmp_path/name).decode) == (3, 'multi')

def test_cim(tmp_path, x):
    torch.save(dict(dataset='cifar10', data=x, label=Y), tmp_path/'data.pt')
    assert torch.equal(load_distilled(tmp_path, factor=1).pixels, x)

@pytest.mark.parametrize('form', ['{:05}', 'new{:03}', '{}'])
def test_folders_of_rded_and_sre2l(tmp_path, data, form):
    "Class 10 is not the third; soft labels where they are stored"
    for c in range(MANY):
        (tmp_path/form.format(c)).mkdir()
        for i in range(ipc): Image.new('RGB', (8, 8), (20*c, 0, i)).save(tmp_path/form.format(c)/f'class{c}_id{i}.png')
    dset = load_distilled(tmp_path, data)
    assert torch.equal((dset.pixels[:, 0, 0, 0]*255).round().long(), 20*dset.y) and dset.classes == data.classes
    if form == '{}': return
    soft = torch.eye(MANY).repeat_interleave(ipc, 0)*.9 + .1/MANY
    torch.save(soft, tmp_path/'labels.pt')
    torch.testing.assert_close(load_distilled(tmp_path, data).y, soft)
    torch.save(soft[1:], tmp_path/'labels.pt')
    with pytest.raises(ValueError, match='one row for each of the 24 images'): load_distilled(tmp_path, data)

def relabelled(root, labels, mix=None, epochs=6, batch=7, each=None):
    "As SRe2L's relabelling; the labels of each image, by hand. `each`: permutations of an epoch in old PyTorch"
    for c in range(MANY):
        (root/str(c)).mkdir(parents=True)
        for i in range(ipc): Image.new('RGB', (8, 8), (20*c, 0, i)).save(root/str(c)/f'{i}.png')
    images = ImageFolder(root, is_valid_file=lambda path: path.endswith('.png'))
    generator, crops = torch.Generator().manual_seed(42), {}
    classes = [int(Path(path).parent.name) for path, _ in images.samples]
    teacher = torch.randn(len(images), MANY) + 6*torch.eye(MANY)[classes]
    loader = DataLoader(range(len(images)), batch, sampler=RandomSampler(images, generator=generator))
    old = lambda: torch.randperm(len(images), generator=generator).split(batch)
    for epoch in range(epochs):
        (labels/f'epoch_{epoch}').mkdir(parents=True)
        for at, ids in enumerate(old() if each else loader):
            b, lam = len(ids), np.random.default_rng(epoch).beta(1, 1) if mix else 1.
            other = torch.randperm(b) if mix else None
            box = [np.int64(v) for v in (0, 1, 5, 6)] if mix == 'cutmix' else None
            z = teacher[ids] + torch.randn(b, MANY)/2
            if mix: z = lam*z + (1 - lam)*teacher[ids[other]]
            parts = [torch.rand(b, 4), torch.rand(b) < .5, other, np.float64(lam) if mix else None, box, z.half()]
            torch.save(parts, labels/f'epoch_{epoch}'/f'batch_{at}.tar')
            for i, label in enumerate(z.half().float().softmax(1)):
                if lam >= .75 or other[i] == i: crops.setdefault(images.samples[ids[i]][0], []).append(label)
    return {path: torch.stack(rows).mean(0) for path, rows in crops.items()}

@pytest.mark.parametrize(('mix', 'each', 'place'), [
    (None, None, '.'), ('cutmix', None, 'FKD'), ('mixup', None, '../FKD'), ('cutmix', 1, 'FKD')])
def test_means_of_the_labels_of_crops(tmp_path, data, mix, each, place):
    "Of SRe2L: in the order of ImageFolder (10 before 2), by either rule of RandomSampler; without crops of two images"
    root = tmp_path/'images'
    expected = relabelled(root, tmp_path/'apart', mix, each=each, epochs=12 if mix else 2)
    (root/place).mkdir(exist_ok=True)
    for epoch in (tmp_path/'apart').iterdir(): epoch.rename(root/place/epoch.name)
    dset = load_distilled(root, data, soft='crops')
    files = [str(root/str(c)/f'{i}.png') for c in sorted(range(MANY), key=str) for i in range(ipc)]
    rows = torch.tensor([int((pixels*255).round()) for pixels in dset.pixels[:, 0, 0, 0]])//20*ipc
    rows = rows + (dset.pixels[:, 2, 0, 0]*255).round().long() # class and number of each image, by its colours
    by_number = torch.stack([expected[path] for path in sorted(files, key=lambda p: (int(Path(p).parent.name), p))])
    torch.testing.assert_close(dset.y, by_number[rows])
    said = ' '.join(dset.provenance['assumed'])
    assert 'labels are means over crops' in said and '--fkd-seed 42' in said
    if place != '../FKD':
        with pytest.raises(ValueError, match='labels of the random crops .*; give soft=crops .*move it elsewhere'):
            load_distilled(root, data)

@pytest.mark.parametrize(('spoil', 'said'), [
    (lambda root, fkd: (root/'3'/'1.png').unlink(), 'labels of 24 crops, but there are 23 images; give'),
    (lambda root, fkd: (fkd/'epoch_1'/'batch_2.tar').write_bytes(b'PK00'), 'batch_2.tar is damaged.*; copy it again'),
    (lambda root, fkd: (fkd/'epoch_1'/'batch_3.tar').unlink(), 'epoch_1 holds labels of 21 crops'),
    (lambda root, fkd: (fkd/'epoch_0'/'batch_0.tar').unlink(), 'batch_0.tar is missing'),
    (lambda root, fkd: torch.save([Path('x')], fkd/'epoch_1'/'batch_0.tar'), 'only runs as code'),
    (lambda root, fkd: [(fkd/f'epoch_{a}').rename(fkd/f'epoch_{b}') for a, b in ((0, 2), (1, 0), (2, 1))],
     'does not fit these images .*; give'),
    (lambda root, fkd: shutil.rmtree(fkd), 'no labels of crops.*leave out soft=crops')])
def test_labels_of_crops_that_do_not_fit(tmp_path, data, spoil, said):
    "Damaged, missing, made of other images, or not there: one line"
    root, fkd = tmp_path/'images', tmp_path/'images'/'FKD'
    relabelled(root, fkd, epochs=2), spoil(root, fkd)
    with pytest.raises(ValueError, match=said): load_distilled(root, data, soft='crops')

def test_folders_with_names_follow_the_data(tmp_path):
    for c, name in enumerate(['b', 'a']):
        (tmp_path/name).mkdir()
        Image.new('RGB', (8, 8), (100*c, 0, 0)).save(tmp_path/name/'0.png')
    with pytest.warns(UserWarning, match='of its own images'): assert load_distilled(tmp_path).classes == ['a', 'b']
    x, y = toy_images(2, 10, 8, 3)
    class Named:
        classes = ['b', 'a']
        def __len__(self): return len(x)
        def __getitem__(self, i): return x[i], int(y[i])
    dset = load_distilled(tmp_path, load_data(Named()))
    assert dset.classes == ['b', 'a'] and dset.pixels[:, 0].amax().item() == pytest.approx(100/255)
    assert dset.pixels[dset.y == 0].max() == 0 # b is black
    (tmp_path/'a').rename(tmp_path/'zebra')
    with pytest.raises(ValueError, match="class 'zebra' is not a class of"):
        load_distilled(tmp_path, load_data(Named()))

@pytest.mark.parametrize('names', [['1', '2', '3'], ['c1', 'c2', 'c3'], ['0', '1', '3']])
def test_folders_whose_names_are_numbers(tmp_path, names):
    "of classes that are not numbered from 0, or that miss one"
    class Named:
        classes = names
        def __len__(self): return 6
        def __getitem__(self, i): return torch.full((1, 8, 8), i//2/9), i//2
    for c, name in enumerate(names):
        (tmp_path/name).mkdir()
        Image.new('L', (8, 8), 100*c).save(tmp_path/name/'0.png')
    dset = load_distilled(tmp_path, load_data(Named()))
    assert dset.classes == names and dset.y.tolist() == [0, 1, 2]
    assert dset.pixels[2].max().item() == pytest.approx(200/255)

@pytest.mark.parametrize('names, last', [(['1', '0'], '1'), (['cat', 'dog'], 'dog')])
def test_numbers_that_name_classes(tmp_path, names, last):
    "are matched by name, also in another order; where the data have other names, by position"
    class Named:
        classes = names
        def __len__(self): return 6
        def __getitem__(self, i): return torch.full((1, 8, 8), i/9), i//3
    x = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    DistilledSet(x, ['0', '1'], [.5], [.2], y=torch.arange(2)).export(tmp_path/'out', 'npz')
    dset = load_distilled(tmp_path/'out', load_data(Named()))
    assert dset.classes == names
    assert [dset.classes[c] for c in dset.y[dset.pixels.flatten(1).amax(1) == 1]] == [last]

@pytest.mark.parametrize('layout', ['chw', 'hwc', 'kip', 'bytes'])
def test_npz(tmp_path, x, layout):
    arrays = dict(images=x.numpy(), labels=Y.numpy())
    if layout != 'chw': arrays['images'] = x.permute(0, 2, 3, 1).numpy()
    if layout == 'kip': arrays['labels'] = np.eye(C)[Y] - 1/C # centred one-hot
    if layout == 'bytes': arrays['images'] = (arrays['images']*255).round().astype(np.uint8)
    np.savez(tmp_path/'set.npz', **arrays)
    dset = load_distilled(tmp_path/'set.npz', stats='cifar10')
    torch.testing.assert_close(dset.pixels, x, atol=.002 if layout == 'bytes' else 0, rtol=0)
    assert torch.equal(dset.y, Y)

def test_big_endian_npz_beyond_unit(tmp_path, x):
    np.savez(tmp_path/'set.npz', images=((x - CIFAR[0])/CIFAR[1]).numpy().astype('>f4'), labels=Y.numpy().astype('>i8'))
    with pytest.raises(ValueError, match='values=normalised'): load_distilled(tmp_path/'set.npz')
    torch.testing.assert_close(load_distilled(tmp_path/'set.npz', 'cifar10', values='normalised').pixels, x)

def stored(path, x):
    "A set in the format that the name of a file says"
    if path.suffix == '.npz': np.savez(path, images=x.numpy(), labels=Y.numpy())
    elif path.suffix == '.tar': archive(path, {f'{i}.{ext}': raw for i, label in enumerate(Y)
                                               for ext, raw in dict(npy=npy(x[i]), cls=b'%d' % label).items()})
    else: torch.save(dict(data=[x, Y], set=dict(images=x, labels=Y), images=x)[path.stem], path)
    return path

FORMS = ['set.npz', 'set.tar', 'set.pt', 'data.pt', 'images.pt']

@pytest.mark.parametrize('name', FORMS)
def test_bytes_are_plain_colours(tmp_path, x, name):
    whole = (x*255).round().to(torch.uint8)
    load = lambda **how: load_distilled(stored(tmp_path/name, whole), 'cifar10', factor=1, **how)
    torch.testing.assert_close(load().pixels, whole/255)
    with pytest.raises(ValueError, match='images are uint8, which cannot be normalised; give values=unit'):
        load(values='normalised')

@pytest.mark.parametrize('least, most', [(0, 1), (0, 255), (-4, 255), (0, 4095)])
@pytest.mark.parametrize('dtype', [torch.int64, torch.int16, torch.uint16, torch.float32])
@pytest.mark.parametrize('name', FORMS)
def test_other_whole_numbers_are_refused(tmp_path, x, name, dtype, least, most):
    "As in load_data, whatever is said of their values"
    if dtype == torch.uint16 and least < 0 or dtype == torch.float32 and most == 1: return # they are no such numbers
    x = (x*most).round()
    x[0, 0, 0, :2] = torch.tensor([least, most])
    for values in None, 'unit', 'normalised':
        with pytest.raises(ValueError, match=f'whole numbers from {least} to {most}, .*; save them .*images/255'):
            load_distilled(stored(tmp_path/name, x.to(dtype)), 'cifar10', factor=1, values=values)

@pytest.mark.parametrize('name', ['disk', 'hub'])
def test_bytes_of_a_table_come_as_lists(tmp_path, x, name, monkeypatch):
    class Table(list):
        features, column_names = {}, ['image', 'label']
    whole = (x*255).round().long()
    table = Table(dict(image=image.tolist(), label=int(label)) for image, label in zip(whole, Y))
    read = lambda *args, **how: table
    monkeypatch.setitem(sys.modules, 'datasets', SimpleNamespace(load_from_disk=read, load_dataset=read))
    (tmp_path/('state.json' if name == 'disk' else 'train.parquet')).touch()
    torch.testing.assert_close(load_distilled(tmp_path, 'cifar10').pixels, whole/255)

def test_huggingface(tmp_path, dset, monkeypatch):
    datasets = pytest.importorskip('datasets', reason='needs the package datasets, which is not installed')
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    dset.export(tmp_path/'out', 'huggingface')
    rows = datasets.load_dataset(str(tmp_path/'out'), split='train', cache_dir=str(tmp_path/'cache'))
    assert rows['label'][:] == dset.labels().tolist()
    rows.save_to_disk(str(tmp_path/'disk'))
    rows.to_parquet(str(tmp_path/'hub'/'data'/'train-00000.parquet'))
    for name in 'disk', 'hub':
        back = load_distilled(tmp_path/name, stats=(dset.mean, dset.std))
        torch.testing.assert_close(back.pixels, dset.images(), atol=.502/255, rtol=0)
        assert torch.equal(back.y, dset.labels())

def test_huggingface_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
    (tmp_path/'dataset_info.json').write_text('{}')
    with pytest.raises(ValueError, match='pip install datasets'): load_distilled(tmp_path)

class Evil:
    def __reduce__(self): return (print, ('code from a file ran',))

def test_no_file_runs_code(tmp_path, x, capsys):
    torch.save([x, Y, Evil()], tmp_path/'data.pt')
    np.savez(tmp_path/'set.npz', images=np.array([Evil()], dtype=object))
    for name in 'data.pt', 'set.npz':
        with pytest.raises(ValueError, match='code'): load_distilled(tmp_path/name)
    assert 'ran' not in capsys.readouterr().out

def test_images_outside_the_folder_are_not_read(tmp_path):
    Image.new('L', (4, 4)).save(tmp_path/'secret.png')
    (tmp_path/'set').mkdir()
    (tmp_path/'set'/'metadata.jsonl').write_text(json.dumps(dict(file_name='../secret.png', label=0)))
    with pytest.raises(ValueError, match='lies outside'): load_distilled(tmp_path/'set')

@pytest.mark.parametrize('how, says', [
    (dict(values='normal'), "values='normal' is unknown; use one of unit"), (dict(soft='kl'), "soft='kl' is unknown"),
    (dict(data='cifar11'), "data='cifar11' is not a dataset name"), (dict(experiment=5), 'holds 2; give 0 to 1')])
def test_wrong_options(tmp_path, x, how, says):
    with pytest.raises(ValueError, match=says): load_distilled(vico(tmp_path, x), **how)

BROKEN = dict(
    short=(lambda x: (x, Y[1:]), {}, 'store one label for each image'),
    negative=(lambda x: (x, Y - 1), {}, 'labels go from -1 to 8'),
    huge=(lambda x: (x, Y*10**9), {}, 'labels go from 0 to 9000000000'),
    nan=(lambda x: (x*float('nan'), Y), {}, 'not finite'),
    empty=(lambda x: (x[:0], Y[:0]), {}, 'holds no images'),
    wide=(lambda x: (9*x - 4, Y), {}, 'lie outside'),
    channels=(lambda x: (x, Y), dict(stats='mnist'), 'images have 3 channels'),
    zero=(lambda x: (x, Y), dict(factor=0), 'factor=0 must be at least 1'),
    text=(lambda x: (x, Y), dict(factor='two'), "factor='two' must be"),
    decode=(lambda x: (x, Y), dict(decode='all'), "decode='all' is unknown"),
    misspelt=(lambda x: (x, Y), dict(facto=1), "'facto' is not an option"))

@pytest.mark.parametrize('change, how, says', BROKEN.values(), ids=BROKEN)
def test_broken_sets(tmp_path, x, change, how, says):
    torch.save([*change(x)], tmp_path/'data.pt')
    with pytest.raises(ValueError, match=says):
        load_distilled(tmp_path/'data.pt', **dict(factor=1, stats='cifar10') | how)

@pytest.mark.parametrize('write', [lambda p: p.write_bytes(b''), lambda p: p.write_bytes(b'PK\x03\x04half'),
                                   lambda p: p.write_text('hello'), lambda p: p.mkdir(), lambda p: None,
                                   lambda p: torch.save(dict(weight=torch.rand(3)), p)])
def test_files_that_are_no_sets(tmp_path, write):
    write(tmp_path/'set.pt')
    with pytest.raises(ValueError, match='set.pt'): load_distilled(tmp_path/'set.pt')

def archive(path, members):
    "A tar archive of name -> bytes"
    with tarfile.open(path, 'w') as tar:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path

def npy(x):
    "An image as the bytes of a .npy file"
    np.save(buffer := io.BytesIO(), x.numpy())
    return buffer.getvalue()

def test_files_of_one_name_in_two_folders_of_an_archive(tmp_path, x):
    members = {f'{i//5}/{i%5}.{ext}': raw for i in range(C*ipc)
               for ext, raw in dict(npy=npy(x[i]), cls=b'%d' % Y[i], json=b'{}').items()}
    dset = load_distilled(archive(tmp_path/'a.tar', members), stats='cifar10')
    assert torch.equal(dset.pixels, x) and torch.equal(dset.y, Y)
    with pytest.raises(ValueError, match=r"b.tar .*'cat', which must be a class number"):
        load_distilled(archive(tmp_path/'b.tar', {'0.npy': npy(x[0]), '0.cls': b'cat'}), stats='cifar10')

def test_headers_with_a_wrong_byte(tmp_path, x):
    "Python's readers raise errors of several kinds"
    raw = npy(x[0])
    with pytest.raises(ValueError, match='b.tar cannot be read as a WebDataset'):
        load_distilled(archive(tmp_path/'b.tar', {'0.npy': raw.replace(b')', b'(', 1), '0.cls': b'1'}), stats='cifar10')
    torch.save([x, Y], tmp_path/'c.pt')
    raw = bytearray((tmp_path/'c.pt').read_bytes())
    raw[raw.index(b'PK\6\7') + 16] = 2 # the archive is one of two disks
    (tmp_path/'c.pt').write_bytes(raw)
    with pytest.raises(ValueError, match='c.pt'): load_distilled(tmp_path/'c.pt', stats='cifar10')

@pytest.mark.parametrize('to', ['pt', 'npz'])
def test_a_file_says_its_classes_and_constants(tmp_path, x, to):
    DistilledSet(x, [f'c{c}' for c in range(C)], [.1, .2, .3], [.4, .5, .6], y=Y).export(tmp_path/'out', to)
    (tmp_path/'out'/'dreamplus.json').unlink() # or a copy of the one file
    dset = load_distilled(tmp_path/'out', values='unit')
    assert dset.classes == [f'c{c}' for c in range(C)] and dset.mean == pytest.approx([.1, .2, .3])
    assert dset.std == pytest.approx([.4, .5, .6]) and torch.equal(dset.pixels, x)

@pytest.mark.parametrize('values', ['unit', 'normalised'])
@pytest.mark.parametrize('to', WRITERS)
def test_constants_of_another_number_of_channels(tmp_path, x, to, values):
    DistilledSet(x, [f'c{c}' for c in range(C)], [.1, .2, .3], [.4, .5, .6], y=Y).export(tmp_path/'out', to)
    said = read_json(side := tmp_path/'out'/'dreamplus.json')
    for mean, std in ([.1, .2, .3], []), ([.5], [.5]):
        side.write_text(json.dumps(said | dict(mean=mean, std=std)))
        with pytest.raises(ValueError, match='out.*images have 3 channels, but the constants'):
            load_distilled(tmp_path/'out', values=values)

def test_channels_last_in_any_format(tmp_path, x):
    torch.save(dict(images=x.permute(0, 2, 3, 1), labels=Y.tolist()), tmp_path/'set.pt')
    assert torch.equal(load_distilled(tmp_path/'set.pt', values='unit', stats='cifar10').pixels, x)

ODD = {
    'labels are words': (dict(images=torch.rand(2, 3, 8, 8), labels=['a', 'b']), {}, 'not numbers'),
    'not square': (dict(images=torch.rand(2, 3, 8, 6), labels=torch.arange(2)), {}, 'not square'),
    'constants are text': (dict(images=torch.rand(2, 3, 8, 8), mean='a', std='b'), {}, 'damaged'),
    'classes': (dict(images=torch.rand(2, 3, 8, 8)), dict(classes=-3), 'classes=-3 must be a whole number of at'),
    'true': (dict(images=torch.rand(2, 3, 8, 8)), dict(classes=True), 'classes=True must be'),
    'experiment': (dict(images=torch.rand(2, 3, 8, 8)), dict(experiment='x'), "experiment='x' must be"),
    'stats': (dict(images=torch.rand(2, 3, 8, 8)), dict(stats=5), 'stats=5 must be a pair'),
    'factor': (dict(images=torch.rand(2, 3, 8, 8), labels=torch.arange(2)), dict(factor=5), 'from 1 to 4')}

@pytest.mark.parametrize('content, how, says', ODD.values(), ids=ODD)
def test_odd_content_and_options_are_named(tmp_path, content, how, says):
    torch.save(content, tmp_path/'set.pt')
    with pytest.raises(ValueError, match=says) as e: load_distilled(tmp_path/'set.pt', **dict(values='unit') | how)
    assert '\n' not in str(e.value) and ('set.pt' in str(e.value) or '=' in says)

@pytest.mark.parametrize('name, text, says', [
    ('args.txt', '{"factor": "two"}', "factor='two' must be"), ('args.txt', '{"factor": -1}', 'factor=-1 must be'),
    ('args.txt', '{"factor": 1.5}', 'factor=1.5 must be'), ('dreamplus.json', '[]', 'not a dictionary'),
    ('dreamplus.json', '{"mean": 5}', 'dreamplus.json'),
    ('dreamplus.json', '{"evaluation": {"lr": "x"}}', 'evaluation.lr')])
def test_damaged_files_beside_a_set(tmp_path, x, name, text, says):
    torch.save([x, Y], tmp_path/'data.pt')
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=says): load_distilled(tmp_path/'data.pt', stats='cifar10')

@pytest.mark.parametrize('lr', [[.1, .2], 'x', float('nan'), -1.])
def test_learned_rates_that_are_none(tmp_path, x, lr):
    torch.save(lr, mtt(tmp_path, x)/'lr_best.pt')
    with pytest.raises(ValueError, match='lr_best.pt holds .*, not a learning rate'):
        load_distilled(tmp_path, values='unit', stats='cifar10')

def test_rows_of_metadata_that_do_not_fit(tmp_path):
    for i in range(2): Image.new('RGB', (8, 8)).save(tmp_path/f'{i}.png')
    def load(**rows):
        (tmp_path/'metadata.jsonl').write_text('\n'.join(
            json.dumps(dict(file_name=f'{i}.png', **{k: v[i] for k, v in rows.items()})) for i in range(2)))
        return load_distilled(tmp_path, stats='cifar10')
    assert load(label=[1, 0], name=['dog', 'cat']).classes == ['cat', 'dog']
    for label in ['a', 'b'], [None, None], [.5, 1.5]:
        with pytest.raises(ValueError, match=str(tmp_path)): load(label=label)

def test_own_folders_take_no_options(tmp_path, x):
    DistilledSet(x, [*'abcdefghijkl'], [.5]*3, [.2]*3, y=Y).save(tmp_path)
    with pytest.raises(ValueError, match="'factor' has no effect"): load_distilled(tmp_path, factor=2)
    assert torch.equal(load_distilled(tmp_path/'distilled.json').pixels, x)

# Evaluation

def test_evaluate_an_imported_set(tmp_path, data, capsys, monkeypatch):
    "The same accuracy as the same set in memory"
    monkeypatch.setitem(PROTOCOLS, 'quick', dict(epochs=1, steps=20))
    pixels = start_pixels(data, 2, key=Key(0, 's')).flatten(0, 1)
    torch.save([pixels, torch.arange(MANY).repeat_interleave(2)], tmp_path/'data.pt')
    for k, (pixels, labels) in dict(x=(data.train.x, data.train.y), test=(data.test.x, data.test.y)).items():
        for c in range(MANY):
            folder = tmp_path/'real'/dict(x='train', test='test')[k]/f'{c:02}'
            folder.mkdir(parents=True)
            for i, image in enumerate(pixels[labels == c]):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder/f'{i}.png')
    command = ['evaluate', tmp_path/'data.pt', '--data', tmp_path/'real', '--set', 'factor=1', '--set', 'width=8',
               '--device', 'cpu',
               '--nets', '1', '--rows', 'distilled', '--out', tmp_path/'result.json']
    assert main([*map(str, command)]) == 0
    assert 'assumed: images are not normalised' in capsys.readouterr().out
    record, real = read_json(tmp_path/'result.json'), load_data(tmp_path/'real')
    dset = load_distilled(tmp_path/'data.pt', real, factor=1)
    dset.evaluation = dict(width=8, augment='color_crop_flip_scale_rotate', mix=.5, norm='instance')
    assert record['rows'][0]['accs'] == score(dset, real, n=1, rows=('distilled',), device='cpu')[0]['accs']
    assert main([*map(str, command[:2]), '--nets', '1']) == 2
    assert 'distill --out' not in capsys.readouterr().err

def test_show_and_scores_of_a_set_of_another_program(tmp_path, capsys, monkeypatch):
    "take the options that say how to read it; its scores join its record, and the leaderboard shows them"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PROTOCOLS, 'quick', dict(epochs=1, steps=2))
    x, y = toy_images(3, 8)
    for i, c in enumerate(y.tolist()):
        Path('real', f'{c}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i, 0].numpy().astype(np.uint16)*16).save(f'real/{c}/{i}.png') # 16 bits, of which 12 are used
    torch.save([x[::8]/255, y[::8]], 'data.pt')
    how = *'--data real --levels 0,4080 --set factor=1 --set width=4'.split(), '--out'
    def done(*argv): assert main([*argv]) == 0, capsys.readouterr().err
    done('show', 'data.pt', *how[:-3])
    assert Image.open('data.pt-grid.png').size[0] > 8 and main(['show', 'data.pt']) == 2
    for options, unread in (how[:-5], True), (how[:-3], False):
        main(['doctor', 'data.pt', *options])
        assert ('readable: data.pt' in capsys.readouterr().out) == unread
    done('evaluate', 'data.pt', '--nets', '1', '--rows', 'distilled', *how, 'theirs.json')
    done('scores', 'data.pt', '--nets', '1', '--archs', 'convnet', *how, 'theirs.json')
    [line] = [line for line in leaderboard('theirs.json')[0]['lines'] if not line['baseline']]
    assert line['lrs'] == read_json('theirs.json')['robust'][0]['lrs'] and 0 < line['ars'] < 1
    torch.save([x[1::8]/255, y[::8]], 'data.pt')
    assert main(['scores', 'data.pt', '--nets', '1', *how, 'theirs.json']) == 2
    assert 'theirs.json is a record of other images' in capsys.readouterr().err

# Export

@pytest.fixture(scope='module')
def digits(): return load_data('digits')

@pytest.fixture(scope='module')
def dset(digits):
    pixels = start_pixels(digits, 2, 2, key=Key(0, 'start'))
    mean, std = (s.flatten().tolist() for s in (digits.mean, digits.std))
    return DistilledSet(pixels, digits.classes, mean, std, factor=2,
                        evaluation=dict(width=16, augment='crop_rotate', mix=.3, lr=.02),
                        provenance=dict(method='idc', data=dict(name='digits')))

@pytest.fixture
def soft(dset):
    return replace(dset, y=torch.eye(10)[dset.y]*.8 + .02)

@pytest.mark.parametrize('decoded', [True, False])
@pytest.mark.parametrize('to', WRITERS)
def test_exports_come_back(tmp_path, dset, soft, to, decoded):
    for s in dset, soft:
        s.export(tmp_path/f'{s.soft}', to, decoded)
        back = load_distilled(tmp_path/f'{s.soft}')
        torch.testing.assert_close(back.images(), s.images(), atol=.502/255, rtol=0)
        torch.testing.assert_close(back.labels().float(), s.labels().float(), atol=1e-6, rtol=0)
        assert (back.classes, back.mean, back.evaluation,
                back.provenance['method']) == (s.classes, s.mean, s.evaluation, 'idc')

def by_hand(folder, to):
    "Images and labels of an export, without dreamplus"
    if to == 'imagefolder':
        images, targets = zip(*ImageFolder(folder))
        x = torch.stack([torch.from_numpy(np.array(image.convert('L'))/255)[None] for image in images])
        return x.float(), torch.tensor(targets)
    if to == 'npz':
        with np.load(folder/'set.npz') as z: return torch.from_numpy(z['images']), torch.from_numpy(z['labels'])
    if to == 'pt': return (stored := torch.load(folder/'set.pt', weights_only=True))['images'], stored['labels']
    if to == 'huggingface':
        rows = [json.loads(line) for line in (folder/'train'/'metadata.jsonl').read_text().splitlines()]
        images = [np.array(Image.open(folder/'train'/r['file_name']))/255 for r in rows]
        return torch.from_numpy(np.stack(images))[:, None].float(), torch.tensor([r['label'] for r in rows])
    if to == 'webdataset':
        with tarfile.open(folder/'set-000000.tar') as tar:
            read = {m.name: tar.extractfile(m) for m in tar}
            keys = sorted({name.split('.')[0] for name in read})
            return (torch.stack([torch.from_numpy(np.load(io.BytesIO(read[f'{k}.npy'].read()))) for k in keys]),
                    torch.tensor([int(read[f'{k}.cls'].read()) for k in keys]))
    said = read_json(folder/'dreamplus.json')
    mean, std = (torch.tensor(said[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    return torch.load(folder/'images.pt', weights_only=True)*std + mean, torch.arange(10).repeat_interleave(8)

@pytest.mark.parametrize('to', WRITERS)
def test_exports_are_what_their_tool_reads(tmp_path, dset, to):
    dset.export(tmp_path/'out', to)
    x, y = by_hand(tmp_path/'out', to)
    torch.testing.assert_close(x, dset.images(), atol=.502/255, rtol=0)
    assert torch.equal(y, dset.labels())

def test_webdataset_reads_the_export(tmp_path, dset):
    webdataset = pytest.importorskip('webdataset', reason='needs the package webdataset, which is not installed')
    dset.export(tmp_path/'out', 'webdataset')
    rows = list(webdataset.WebDataset(str(tmp_path/'out'/'set-000000.tar'), shardshuffle=False).decode())
    assert [r['cls'] for r in rows] == dset.labels().tolist()

NEEDS = dict(huggingface='datasets', webdataset='webdataset')

def readme_code(folder):
    return re.search(r'```python\n(.*?)```', (folder/'README.md').read_text(encoding='utf-8'), re.S)[1]

@pytest.mark.parametrize('decoded', [True, False])
@pytest.mark.parametrize('to', WRITERS)
def test_the_readme_sees_what_evaluate_sees(tmp_path, dset, soft, digits, monkeypatch, to, decoded):
    if to in NEEDS: pytest.importorskip(NEEDS[to], reason=f'needs the package {NEEDS[to]}, which is not installed')
    for s in dset, soft:
        s.export(tmp_path/f'{s.soft}', to, decoded)
        monkeypatch.chdir(tmp_path/f'{s.soft}')
        exec(readme_code(tmp_path/f'{s.soft}').replace('500*', '1*'), names := {})
        order = [names['y'].argmax(1) if s.soft else names['y']][0].argsort(stable=True) # decoded cell by cell
        a, b = (torch.stack([part.sort(0)[0].flatten(1) for part in x.split(8)]) for x in
                (names['x'][order], s.images()))
        torch.testing.assert_close(a, b, atol=.01, rtol=0)
        torch.testing.assert_close(names['y'][order].float(), s.labels().float(), atol=1e-6, rtol=0)

@pytest.mark.parametrize('mode', ['bicubic', 'sharp'])
def test_the_readme_decodes(tmp_path, dset, monkeypatch, mode):
    s = replace(dset, decode=mode)
    s.export(tmp_path/'out', 'npz', decoded=False)
    assert load_distilled(tmp_path/'out').decode == mode
    monkeypatch.chdir(tmp_path/'out')
    exec(readme_code(tmp_path/'out').replace('500*', '1*'), names := {})
    by_class = names['x'].unflatten(0, (4, 10, 2)).transpose(0, 1).flatten(0, 2) # the code decodes cell by cell
    torch.testing.assert_close(by_class, s.images(), atol=1e-5, rtol=0)

@pytest.mark.parametrize('mode', ['multi', 'bound'])
def test_images_of_several_factors_are_exported_decoded(tmp_path, dset, mode):
    with pytest.raises(ValueError, match='need dreamplus to be decoded; export the decoded images'):
        replace(dset, decode=mode).export(tmp_path/'out', 'npz', decoded=False)

@pytest.mark.parametrize('to', WRITERS)
def test_the_readme_trains_in_ten_lines(tmp_path, dset, soft, to):
    "without imports; stored images that hold several need three more"
    for s in dset, soft:
        s.export(tmp_path/f'{s.soft}', to)
        code = [line for line in readme_code(tmp_path/f'{s.soft}').splitlines() if not re.match('from |import ', line)]
        assert 0 < len(code) <= 10 and all(map(str.strip, code)), code

@pytest.mark.parametrize('channels', [2, 4])
def test_the_readme_trains_on_any_number_of_channels(channels):
    dset = DistilledSet(torch.rand(2, 1, channels, 8, 8), [0, 1], [.5]*channels, [.2]*channels,
                        evaluation=dict(width=8, augment='color_crop_flip'))
    exec(training_code(dset, '').replace('500*', '1*'), dict(x=dset.images(), y=dset.labels()))

@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('to', ['imagefolder', 'npz', 'pt'])
def test_the_readme_trains_on_a_set_with_an_empty_class(tmp_path, monkeypatch, to, soft):
    y = torch.tensor([0, 2])
    dset = DistilledSet(torch.rand(2, 1, 8, 8), [*'abc'], [.5], [.2], evaluation=dict(width=8),
                        y=torch.eye(3)[y]*.7 + .1 if soft else y)
    dset.export(tmp_path/'out', to)
    monkeypatch.chdir(tmp_path/'out')
    exec(readme_code(tmp_path/'out').replace('500*', '1*'), names := {})
    torch.testing.assert_close(names['y'], dset.y)
    assert load_distilled('.').counts == [1, 0, 1]

def test_the_readme_trains_as_evaluate_does(tmp_path, digits, monkeypatch):
    pixels = start_pixels(digits, 1, key=Key(0, 'start'))
    mean, std = (s.flatten().tolist() for s in (digits.mean, digits.std))
    dset = DistilledSet(pixels, digits.classes, mean, std,
                        evaluation=dict(width=8, augment='crop_scale_rotate', mix=.5))
    dset.export(tmp_path/'out', 'npz')
    monkeypatch.chdir(tmp_path/'out')
    code = readme_code(tmp_path/'out')
    for long, short in {'500': '150', '333': '100', '416': '125'}.items(): # steps, and where the rate falls
        assert long in code
        code = code.replace(long, short)
    exec(code, names := {})
    with torch.no_grad(): right = names['net'](to_float(digits.test.x)).argmax(1) == digits.test.y
    ours = score(dset, digits, n=1, rows=('distilled',), device='cpu', epochs=0, steps=150)[0]['acc']
    assert right.float().mean().item() == pytest.approx(ours, abs=.08) and ours > .6

def test_whitened_sets(tmp_path, dset, digits, monkeypatch):
    white = replace(dset, evaluation=dict(zca=True, width=8))
    with pytest.raises(ValueError, match=r'give data= \(--data\)'): white.export(tmp_path/'out', 'ddranking')
    assert [*tmp_path.iterdir()] == []
    white.export(tmp_path/'out', 'ddranking', data=digits)
    torch.testing.assert_close(torch.load(tmp_path/'out'/'images.pt', weights_only=True),
                               whitened(digits).normalize(dset.images()))
    torch.testing.assert_close(load_distilled(tmp_path/'out', digits).pixels, dset.images(), atol=1e-3, rtol=0)
    white.export(tmp_path/'npz', 'npz')
    monkeypatch.chdir(tmp_path/'npz')
    code = readme_code(tmp_path/'npz').replace('real = ...', 'real = stored').replace('500*', '1*')
    exec(code, names := dict(stored=to_float(digits.train.x)))
    torch.testing.assert_close(names['x'], whitened(digits).normalize(dset.images()), atol=1e-3, rtol=0)

def test_ddranking_uses_its_own_constants(tmp_path, x):
    dset = DistilledSet(x, [str(c) for c in range(C)], [.1]*3, [.9]*3, y=Y, provenance=dict(data=dict(name='cifar100')))
    dset.export(tmp_path/'out', 'ddranking')
    torch.testing.assert_close(torch.load(tmp_path/'out'/'images.pt', weights_only=True), (x - CIFAR[0])/CIFAR[1])

def test_an_export_that_stops_leaves_nothing(tmp_path, dset, monkeypatch):
    def stop(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('dreamplus.exchange.writers.write_json', stop)
    for to in WRITERS:
        with pytest.raises(OSError): dset.export(tmp_path/'new'/'out', to)
    assert [*tmp_path.iterdir()] == []
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'file').write_text('mine')
    with pytest.raises(ValueError, match='is not empty'): dset.export(tmp_path/'mine', 'npz')

def test_images_of_a_table_are_decoded_once(tmp_path, dset, monkeypatch):
    dset.export(tmp_path/'out', 'huggingface')
    opened, true = [], formats.decoded_image
    monkeypatch.setattr(formats, 'decoded_image', lambda path, *more: opened.append(path) or true(path, *more))
    assert len(load_distilled(tmp_path/'out').pixels) == len(opened)

@pytest.mark.parametrize('overwrite', [False, True])
def test_class_folders_that_stop_change_nothing(tmp_path, dset, monkeypatch, overwrite):
    if overwrite: dset.to_imagefolder(tmp_path/'new'/'out')
    before, count = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}, iter(range(99))
    save = Image.Image.save
    def full(image, *args, **kw):
        if next(count) == 5: raise OSError(28, 'No space left on device')
        save(image, *args, **kw)
    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(OSError): dset.to_imagefolder(tmp_path/'new'/'out', overwrite=overwrite)
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before
    assert overwrite or [*tmp_path.iterdir()] == []

@pytest.mark.parametrize('call, kind, says', [
    (lambda s: s.to_imagefolder(5), TypeError, 'path must be'), (lambda s: s.export(5), TypeError, 'path must be'),
    (lambda s: s.export('x', data=5), TypeError, 'load_data makes one'), (lambda s: s.dls(bs=0), ValueError, 'bs=0'),
    (lambda s: s.grid(classes=0), ValueError, 'classes=0'), (lambda s: s.select(5), TypeError, 'must be a list'),
    (lambda s: s.show(cell='x'), ValueError, "cell='x'"),
    (lambda s: score(s, load_data(toy_images(MANY, 3, 8, 3)), rows=()), ValueError, 'names no row'),
    (lambda s: recipe('best', 'digits', 0), ValueError, 'ipc=0'),
    (lambda s: distill(load_data(toy_images(2, 3, 8, 1)), 'dm', start={}), TypeError, 'start={}'),
    (lambda s: distill(load_data(toy_images(2, 3, 8, 1)), 'dm', seed=2**70), ValueError, r'below 2\*\*63')])
def test_wrong_arguments_of_sets(dset, call, kind, says):
    with pytest.raises(kind, match=says): call(dset)

def test_export_command(tmp_path, dset, capsys):
    dset.save(tmp_path/'run')
    assert main(['export', str(tmp_path/'run'), '--to', 'npz', '--decoded']) == 0
    assert load_distilled(tmp_path/'run-npz').factor == 1
    assert main(['export', str(tmp_path/'run'), '--to',
                 'zip']) == 2 and "to='zip' is unknown" in capsys.readouterr().err

def test_select_and_join(dset, soft):
    part = soft.select([7, '1'])
    assert part.classes == ['7', '1'] and torch.allclose(part.y.sum(1), torch.ones(4))
    assert torch.equal(part.pixels, torch.cat([dset.pixels[dset.y == c] for c in (7, 1)]))
    both = dset + soft
    assert both.soft and both.counts == [4]*10 and both.provenance['method'] == 'idc + idc'
    for wrong in [], [7, '7'], ['cat'], [10], [True]:
        with pytest.raises(ValueError): dset.select(wrong)
    with pytest.raises(ValueError, match='differ in classes'): dset + part
    with pytest.raises(TypeError): dset + 1

@pytest.mark.parametrize('soft', [False, True])
def test_select_needs_images(soft):
    y = torch.tensor([0, 2])
    dset = DistilledSet(torch.rand(2, 1, 8, 8), [*'abc'], [.5], [.2], y=torch.eye(3)[y]*.7 + .1 if soft else y)
    assert dset.select(['b', 'c']).counts == [0, 1]
    with pytest.raises(ValueError, match="the set has no image of class 'b'; give classes with images"):
        dset.select(['b'])

def test_evaluate_set_needs_data(tmp_path, dset):
    dset.save(tmp_path)
    with pytest.raises(ValueError, match='does not say on which data to test'): evaluate_set(tmp_path)
